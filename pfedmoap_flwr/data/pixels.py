"""From what a file holds to the 8-bit colours that CLIP reads: deep pixels are scaled, not cut off.

A pixel of more than 8 bits (16-bit PNG and TIFF, DICOM) has values that mean something to whoever
took the image. They are scaled linearly: from a window that the settings give, or the file names
(DICOM, which may name a sigmoid instead), or else from the image's own lowest and highest value.
"""

import io
from typing import IO, Any

import numpy as np
from PIL import Image

Window = tuple[float, float]
Info = dict[str | tuple[int, int], Any]  # as Pillow types it
"""The values that become black and white, the lower one first."""

MEDICAL = "DICOM"
MAGIC_AT, MAGIC = 128, b"DICM"


def read_window(text: str) -> Window | None:
    """Return the window of a setting, as "-160:240"; None for "".

    Raises ValueError for anything else.
    """
    if not text:
        return None
    low, _, high = text.partition(":")
    try:
        window = float(low), float(high)
    except ValueError:
        window = 0.0, 0.0
    if not window[0] < window[1] or not np.isfinite(window).all():
        raise ValueError("must be LOW:HIGH, two numbers, as -160:240")
    return window


def is_deep(image: Image.Image) -> bool:
    """Tell whether pixels have more than 8 bits: Pillow's modes I;16, I and F."""
    return image.mode.startswith("I") or image.mode == "F"


def frames(image: Image.Image) -> int:
    """Return how many images a file holds, the first of which is read."""
    return int(image.info.get("frames", getattr(image, "n_frames", 1)))


def as_rgb(image: Image.Image, window: Window | None = None) -> Image.Image:
    """Return the first frame in 8-bit colours. A window is for deep pixels alone.

    Values below and above the window are black and white; those that are no numbers are black.
    """
    if not is_deep(image):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.float64)
    real = np.isfinite(values)
    window = window or image.info.get("window")
    if window is None and (curve := image.info.get("sigmoid")):
        values, window = _sigmoid(values, *curve), (0.0, 1.0)
    if window is None:
        window = (values[real].min(), values[real].max()) if real.any() else (0.0, 0.0)
    low, high = window
    shares = np.where(real, (values - low) / ((high - low) or 1.0), 0.0).clip(0.0, 1.0)
    if image.info.get("inverted"):
        shares = np.where(real, 1.0 - shares, 0.0)
    return Image.fromarray(np.rint(shares * 255).astype(np.uint8)).convert("RGB")


def open_dicom(file: IO[bytes], name: str | bytes = "") -> Image.Image:
    """Return the first frame of a DICOM file: mode F in the file's own units, or RGB.

    In `info` stand its window, or centre and width of a sigmoid, whether it is inverted
    (MONOCHROME1), and its number of frames.

    Raises SyntaxError where it is no DICOM file, as Pillow wants it; pydicom's errors else.
    """
    file.seek(MAGIC_AT)
    if file.read(len(MAGIC)) != MAGIC:
        raise SyntaxError("not a DICOM file")
    try:
        import pydicom
        from pydicom import pixels
    except ModuleNotFoundError:
        raise SyntaxError("a DICOM file, for which pydicom is needed") from None
    file.seek(0)
    data = pydicom.dcmread(io.BytesIO(file.read()))
    if name:  # Pillow opened it, and leaves it to the image, which does not need it
        file.close()
    values = pixels.pixel_array(data, index=0)
    kind = str(data.get("PhotometricInterpretation", ""))
    info: Info = {"frames": int(data.get("NumberOfFrames", 1) or 1)}
    if kind == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, data)
    if values.ndim == 3:
        image = Image.fromarray((values >> (8 * (values.itemsize - 1))).astype(np.uint8))
    else:
        values = pixels.apply_modality_lut(values, data)
        if window := _window(data):
            info |= window
        elif "VOILUTSequence" in data:
            values = pixels.apply_voi_lut(values, data)
        info["inverted"] = kind == "MONOCHROME1"
        image = Image.fromarray(np.asarray(values, np.float32))
    image.info |= info
    return image


def _sigmoid(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """Return values from 0 to 1 (PS3.3, C.11.2.1.3.1)."""
    with np.errstate(over="ignore"):  # infinity, and its share is 0
        return 1 / (1 + np.exp(-4 * (values - centre) / width))


def _window(data: Any) -> Info:
    """Return the first window that a DICOM file names (PS3.3, C.11.2.1.2 and C.11.2.1.3).

    "window" with its ends, or "sigmoid" with its centre and width; nothing where there is none.
    """
    try:
        # One number, or several of which the first counts
        centre, width = (
            float(np.ravel(value)[0]) for value in (data.WindowCenter, data.WindowWidth)
        )
    except (AttributeError, TypeError, ValueError, IndexError):
        return {}
    function = data.get("VOILUTFunction", "LINEAR")
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width <= 0:
        return {}
    if function == "SIGMOID":
        return {"sigmoid": (centre, width)}
    return {"window": (centre - width / 2, centre + width / 2)}


# Whatever opens an image by Pillow, `datasets` too, opens DICOM files from now on. An image that is
# decoded already will do, though the type asks for one that reads its file later
Image.register_open(MEDICAL, open_dicom)  # type: ignore[arg-type]
