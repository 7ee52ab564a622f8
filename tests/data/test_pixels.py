"""Images of a clinic: deep pixels scaled and not cut off, frames, DICOM with its window."""

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pfedmoap_flwr.clip.features import Reading, read_images
from pfedmoap_flwr.data.images import load_images
from pfedmoap_flwr.data.pixels import as_rgb, frames, is_deep
from pfedmoap_flwr.data.settings import ImageSettings
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.settings import build
from support.tiny import frozen_clip

RAMP = np.linspace(1000, 41000, 256).reshape(16, 16)


def saved(values: np.ndarray, suffix: str) -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(values).save(file, suffix)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("uint16", "PNG"), ("uint16", "TIFF"), ("int32", "TIFF"), ("float32", "TIFF")],
)
def test_deep_pixels_are_scaled_to_their_range(kind: str, suffix: str) -> None:
    image = saved(RAMP.astype(kind), suffix)
    assert is_deep(image)
    # What became of it before: nearly all white
    assert np.mean(np.asarray(image.convert("RGB")) == 255) > 0.9 or kind == "float32"
    pixels = np.asarray(as_rgb(image))
    assert pixels.shape == (16, 16, 3)
    by_hand = np.round((RAMP.astype(kind).astype(float) - 1000) / 40000 * 255)
    assert np.abs(pixels[..., 0] - by_hand).max() <= 1
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)


def test_a_window_cuts_what_is_outside_it() -> None:
    image = saved(RAMP.astype("uint16"), "PNG")
    pixels = np.asarray(as_rgb(image, (11000.0, 31000.0)))[..., 0]
    assert np.all(pixels[RAMP < 11000] == 0)
    assert np.all(pixels[RAMP > 31000] == 255)
    middle = np.abs(RAMP - 21000).argmin()
    assert abs(int(pixels.flat[middle]) - 128) <= 2


def test_images_of_8_bits_are_as_ever() -> None:
    for mode in ("L", "RGB", "RGBA", "P", "CMYK", "1", "LA"):
        image = Image.fromarray(RAMP.astype("uint8")).convert("RGB").convert(mode)
        assert as_rgb(image, (0.0, 1.0)).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("values", [np.full((4, 4), 7.0), np.full((4, 4), np.nan)])
def test_a_picture_of_nothing_is_black(values: np.ndarray) -> None:
    assert not np.asarray(as_rgb(Image.fromarray(values.astype("float32")))).any()


def test_no_number_is_black_and_has_no_say() -> None:
    values = np.array([[0, 5], [10, np.inf]], "float32")
    assert np.asarray(as_rgb(Image.fromarray(values)))[..., 0].tolist() == [[0, 128], [255, 0]]


@pytest.mark.parametrize("text", ["5", "3:2", "a:b", "1:nan", ":"])
def test_a_window_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"data.window=.*: must be LOW:HIGH, two numbers"):
        build(ImageSettings, {"data.window": text}, "data.")


def test_what_was_done_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "images"
    for name in ("ill", "well"):
        (folder / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray((RAMP + number).astype("uint16")).save(folder / name / f"{number}.png")
    one = Image.fromarray(RAMP.astype("uint8"))
    one.save(folder / "ill" / "many.tiff", save_all=True, append_images=[one, one])
    settings = ImageSettings(name="folder", path=str(folder))
    with caplog.at_level(logging.WARNING, "flwr.pfedmoap"):
        images = load_images(settings)
    said = (
        "20 of more than 8 bits, each scaled by its own window or range; "
        "1 of several frames, of which the first is read"
    )
    assert said in caplog.text
    assert images.provenance["pixels"] == said
    again = load_images(settings.model_copy(update={"window": "0:65535"}))
    assert "each scaled as data.window=0:65535 says" in again.provenance["pixels"]
    # Other pixels are other features, which the cache must not mix up
    table, clip = images.splits["train"], frozen_clip()
    own, fixed = (
        read_images(clip, table, Reading("pixels"), window=i.window) for i in (images, again)
    )
    assert own.std() > 1.5 * fixed.std()


# DICOM


def dicom(path: Path, values: np.ndarray, **tags: Any) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    data = pydicom.Dataset()
    data.SOPClassUID, data.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.Rows, data.Columns = values.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, int(values.dtype.kind == "i")
    data.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 400, "WindowWidth": 900},
        {"WindowCenter": [40, 500], "WindowWidth": [350, 2000]},
        {"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 40, "WindowWidth": 300, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": -200, "WindowWidth": 800, "RescaleSlope": 2, "RescaleIntercept": -1024},
    ],
)
@pytest.mark.parametrize("inverted", [False, True])
def test_a_window_is_applied_as_pydicom_does(
    tags: dict[str, Any], inverted: bool, tmp_path: Path
) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom import pixels

    values = np.linspace(-1200, 1500, 64).reshape(8, 8).astype("int16")
    path = tmp_path / "scan.dcm"
    kind = {"PhotometricInterpretation": "MONOCHROME1"} if inverted else {}
    dicom(path, values, **tags, **kind)
    data = pydicom.dcmread(path)
    theirs = pixels.apply_voi_lut(pixels.apply_modality_lut(data.pixel_array, data), data)
    # In the units of the stored values' range, which pydicom fills
    low, high = float(theirs.min()), float(theirs.max())
    expected = (theirs - low) / (high - low)
    ours = np.asarray(as_rgb(Image.open(path)))[..., 0] / 255
    np.testing.assert_allclose(ours, 1 - expected if inverted else expected, atol=0.003)
    assert ours.min() == 0
    assert ours.max() == 1


def test_a_settings_window_goes_over_the_files(tmp_path: Path) -> None:
    path = tmp_path / "scan.dcm"
    values = np.array([[0, 50], [100, 200]], "int16")
    dicom(path, values, WindowCenter=5000, WindowWidth=2, NumberOfFrames=1)
    assert not np.asarray(as_rgb(Image.open(path))).any()
    pixels = np.asarray(as_rgb(Image.open(path), (0.0, 100.0)))[..., 0]
    assert pixels.tolist() == [[0, 128], [255, 255]]


def test_the_first_frame_is_read_and_the_number_known(tmp_path: Path) -> None:
    path = tmp_path / "scan.dcm"
    values = np.array([[[0, 10]], [[7, 7]], [[9, 9]]], "uint16")
    dicom(path, values, NumberOfFrames=3)
    image = Image.open(path)
    assert frames(image) == 3
    assert np.asarray(as_rgb(image))[..., 0].tolist() == [[0, 255]]


def test_a_folder_of_dicom_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ill", "well"):
        (tmp_path / name).mkdir()
        for number in range(10):
            values = np.arange(16).reshape(4, 4).astype("uint16") + number
            dicom(tmp_path / name / f"{number}.dcm", values)
    (tmp_path / "ill" / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"nonsense")
    images = load_images(ImageSettings(name="folder", path=str(tmp_path)))
    assert images.provenance["broken"] == 1
    assert "20 of more than 8 bits" in images.provenance["pixels"]
    assert images.splits["train"][0]["image"].size == (4, 4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'pfedmoap-flwr\[medical\]'"):
        load_images(ImageSettings(name="folder", path=str(tmp_path), strict=True))


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "examples_rgb_color.dcm"])
def test_real_files_can_be_read(name: str) -> None:
    pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip("comes with pydicom's larger files")
    pixels = np.asarray(as_rgb(Image.open(path)))
    assert pixels.std() > 10
