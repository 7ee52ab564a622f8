"""DuAl-PT: both distances by hand, and where the sentences come from."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from pfedmoap_flwr import config
from pfedmoap_flwr.clip.words import encode_text
from pfedmoap_flwr.data.federated import Task
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.parts.descriptions import describe, distance_to_patches
from support.federation import Exchange, Federate, make_method
from support.tiny import CLASSNAMES

# What holds the prompt back, let go
OVERFITTING = {"dualpt.text-weight": 0.01, "dualpt.patch-weight": 0.01}
SENTENCES = {
    "red panda": "a reddish animal with a long tail_ and {white} ears.",
    "Blue_Whale": "a very large animal of the sea.",
    "green tree frog": "a small green animal with sticky toes.",
    "snow owl": "a white bird with yellow eyes.",
    "something else": "is not asked for.",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.json"
    path.write_text(json.dumps(SENTENCES))
    return path


def test_the_distance_to_patches_by_hand() -> None:
    patches = torch.tensor([[[3.0, 0.0], [0.0, 2.0]], [[0.0, 5.0], [0.0, 1.0]], [[1.0, 1.0]] * 2])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    found = distance_to_patches(patches, texts, torch.tensor([1, 0, -100]))
    # Image 0 finds patches at cosines 0.6 and 0.8 of its class, image 1 two at cosine 0
    first = 1 / (1 + math.exp((0.8 - 0.6) / 0.1))
    expected = ((first * 0.4 + (1 - first) * 0.2) + 1.0) / 2
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_the_sum_of_three_terms(file: Path) -> None:
    weights = {"dualpt.text-weight": 0.7, "dualpt.patch-weight": 0.3}
    method = make_method("dualpt", **{"dualpt.descriptions": str(file), **weights})
    head = method.build()
    tokens, labels = torch.randn(3, 5, 64), torch.tensor([2, 0, 1])
    texts = head.encode().double()
    unit = F.normalize(tokens.double(), dim=-1)
    wrong = F.cross_entropy(head.logit_scale * unit[:, 0] @ texts.t(), labels)
    described = torch.stack([1 - texts[c] @ method.described[c].double() for c in range(4)])
    to_patches = []
    for b, label in enumerate(labels.tolist()):
        near = unit[b, 1:] @ texts[label]
        attention = torch.exp(near / 0.1) / torch.exp(near / 0.1).sum()
        to_patches.append((attention * (1 - near)).sum())
    expected = wrong + 0.7 * described.mean() + 0.3 * sum(to_patches) / 3
    found = method.loss(head, tokens, labels, {})
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_9_without_the_two_terms_it_is_promptfl() -> None:
    zero = {"dualpt.text-weight": 0.0, "dualpt.patch-weight": 0.0}
    method, plain = make_method("dualpt", **zero), make_method("promptfl")
    tokens, labels = torch.randn(3, 5, 64), torch.arange(3)
    head, other = method.build(), plain.build()
    method.loss(head, tokens, labels, {}).backward()
    plain.loss(other, tokens[:, 0], labels, {}).backward()
    torch.testing.assert_close(head.ctx.grad, other.ctx.grad)


def test_sentences_come_from_the_file_by_class_name(file: Path) -> None:
    method = make_method("dualpt", **{"dualpt.descriptions": str(file)})
    sentences = [SENTENCES[name] for name in list(SENTENCES)[:4]]
    expected = encode_text(
        method.clip.model, method.clip.tokenizer, [text.replace("_", " ") for text in sentences]
    )
    torch.testing.assert_close(method.described, expected)


def test_every_class_of_the_bundled_data_has_a_sentence_of_its_own() -> None:
    # The file lies beside the real data set, whose classes tests replace by others
    root = Path(__file__).parents[2] / "pfedmoap_flwr" / "assets"
    said = json.loads((root / "descriptions" / "emoji-domains.json").read_text())
    schema = pq.read_schema(root / "emoji-domains" / "train.parquet").metadata[b"huggingface"]
    names = json.loads(schema)["info"]["features"]["label"]["names"]
    assert list(said) == names
    assert len(set(said.values())) == len(names)
    clip = make_method("promptfl").clip
    described = describe(clip, Task(tuple(names), "a drawing of {}."), "", "dualpt.descriptions")
    torch.testing.assert_close(
        described, encode_text(clip.model, clip.tokenizer, list(said.values()))
    )


def test_other_classes_without_a_file_get_the_plain_sentence_and_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    method = make_method("dualpt")
    ours = [record for record in caplog.records if record.name == "flwr.pfedmoap"]
    # A set: tests before this one may have left a second handler
    (said,) = {record.getMessage() for record in ours if record.levelno == logging.WARNING}
    assert "dualpt.descriptions names a file" in said
    plain = method.clip.zeroshot(tuple(CLASSNAMES), "a drawing of {}.")
    assert torch.equal(method.described, plain)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("{}", "has no sentence for class 'red panda'"),
        (json.dumps(["a"]), 'must be {"class name": "sentence", ...} in JSON'),
        (json.dumps({"red panda": 1}), 'must be {"class name": "sentence", ...} in JSON'),
        (json.dumps({**SENTENCES, "snow owl": "a bird " * 40}), "tokens and the text tower reads"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_setting(
    content: str | None, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "said.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError) as caught:
        make_method("dualpt", **{"dualpt.descriptions": str(path)})
    said = str(caught.value)
    assert said.startswith(f"setting dualpt.descriptions={str(path)!r}: ")
    assert reason in said
    assert "\n" not in said


def test_a_file_is_found_from_any_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    flat: dict[str, Any] = {"method": "dualpt", "dualpt.descriptions": file.name}
    assert config.absolute(flat)["dualpt.descriptions"] == str(file.resolve())


def test_the_prompt_alone_travels(federate: Federate, wire: list[Exchange]) -> None:
    federate(method="dualpt", num_server_rounds=1)
    assert {name for e in wire for name in (*e.up, *e.down)} == {"ctx"}
