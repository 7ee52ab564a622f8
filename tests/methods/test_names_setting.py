"""The setting prompt.names: every method's prompt stands for all names of a class."""

import re
from pathlib import Path

import pytest
import torch

from pfedmoap_flwr import methods
from pfedmoap_flwr.methods.base import PromptHead
from support import ROOT
from support.federation import Federate, make_method, rounds, tensor_files

TOML = '"red panda" = ["red panda", "firefox", "small bear"]\n"snow_owl" = ["white owl"]\n'


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "names.toml"
    path.write_text(TOML)
    return str(path)


@pytest.mark.parametrize(
    "name", [n for n in methods.names() if issubclass(methods.load(n).head, PromptHead)]
)
@pytest.mark.parametrize("class_specific", [False, True])
def test_every_method_has_a_feature_for_each_class(
    name: str, class_specific: bool, file: str
) -> None:
    changes = {"prompt.class-specific": class_specific}
    plain, named = (
        make_method(name, **changes, **more).build() for more in ({}, {"prompt.names": file})
    )
    assert plain.ctx_shape == named.ctx_shape
    texts = []
    for head in (plain, named):
        encoded = head.encode()
        texts.append(encoded[0] if isinstance(encoded, tuple) else encoded)
    assert texts[0].shape == texts[1].shape
    same = [
        torch.allclose(a, b, atol=1e-6) for a, b in zip(*(t.unbind(-2) for t in texts), strict=True)
    ]
    # The first and the last class have other names
    assert same == [False, True, True, False]


def test_the_pages_example(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "prompts.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "names.toml").write_text(example)
    changes = {"prompt.names": str(tmp_path / "names.toml")}
    assert make_method("promptfl", **changes).build().encoder.counts == (3, 1, 1, 1)


def test_a_run_with_names(federate: Federate, file: str, tmp_path: Path) -> None:
    run = federate("names", method="promptfl", flat={"prompt.names": file})
    first, second = (record.train_loss or 0.0 for record in run.rounds()[1:])
    assert 0 < second < first
    own = tmp_path / "own.json"
    own.write_text('{"red panda": ["red panda"], "snow_owl": "snow_owl"}')
    plain = federate("plain", method="promptfl")
    same = federate("same", method="promptfl", flat={"prompt.names": str(own)})
    assert rounds(same) == rounds(plain) != rounds(run)
    assert tensor_files(same) == tensor_files(plain)
