"""pfedmoap inspect: what it says of a gate, against the attention computed by hand."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from pfedmoap_flwr.cli.main import main
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.report.gates import gates_of
from pfedmoap_flwr.runs.find_model import RunModels
from pfedmoap_flwr.training.node import node_of
from support.federation import Federate, make_method
from support.tiny import NUM_CLIENTS


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_shares_and_entropy_are_those_of_the_kept_gate(federate: Federate) -> None:
    run = federate(num_server_rounds=3, lr=0.05, flat={"pfedmoap.score-scale": 20.0})
    views = gates_of(RunModels(run.path))
    assert [view.client_id for view in views] == list(range(NUM_CLIENTS))
    method = make_method("pfedmoap")
    node = node_of(method.settings.clip, method.settings.data, 0, "cpu", method.reads(method.own))
    (path,) = run.path.rglob("client-2/round-00003.safetensors")
    kept = load_file(path)
    prompts = [kept["ctx"], *kept["experts"]]
    encoder = method.build().encoder
    texts = [encoder(prompt).detach().double().numpy() for prompt in prompts]
    images = unit(node.split(2, "test").features.double().numpy())
    reduce = {"img": images, "txt": np.stack(texts)}
    small = {k: unit(v.reshape(*v.shape[:-1], 32, 2).mean(-1)) for k, v in reduce.items()}
    weights = {name: tensor.double().numpy() for name, tensor in kept.items()}
    query = small["img"] @ weights["gate.query.weight"].T + weights["gate.query.bias"]
    key = small["txt"] @ weights["gate.key.weight"].T + weights["gate.key.bias"]
    shares, entropies, attentions = [], [], []
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        scores = np.exp(20.0 * np.einsum("bd,kcd->bkc", query[:, part], key[..., part]))
        attention = scores / scores.sum(axis=1, keepdims=True)
        attentions.append(attention)
        shares.append(attention.mean(axis=(0, 2)))
        entropies.append(-(attention * np.log(attention)).sum(axis=1).mean())
    np.testing.assert_allclose(views[2].shares, np.mean(shares, axis=0), rtol=1e-4)
    assert views[2].entropy == pytest.approx(np.mean(entropies) / np.log(3), rel=1e-4)
    assert sum(views[2].shares) == pytest.approx(1)
    by_class = np.mean([a.mean(axis=0) for a in attentions], axis=0)
    np.testing.assert_allclose(views[2].by_class, by_class, rtol=1e-4)
    owners = [f"client {i}" for i in run.rounds()[-1].lent[2]]
    assert views[2].owners == ("own", *owners)
    cosines = [(text * texts[0]).sum(-1).mean() for text in texts[1:]]
    assert views[2].cosine == pytest.approx(np.mean(cosines), rel=1e-4)
    assert [view.client_id for view in gates_of(RunModels(run.path), [1, 3])] == [1, 3]


def test_the_command_prints_a_row_a_client_and_draws(
    federate: Federate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = federate(num_server_rounds=2)
    figure = tmp_path / "gates.png"
    assert main(["inspect", str(run.path), "--figure", str(figure)]) == 0
    assert figure.stat().st_size > 1000
    printed = capsys.readouterr().out
    rows = [line.split()[0] for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert rows == [str(i) for i in range(NUM_CLIENTS)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "promptfl"}, "promptfl has no gate"),
        ({"flat": {"pfedmoap.gate": "none"}}, "pfedmoap has no gate"),
        ({"num_server_rounds": 1}, "no client there has borrowed experts"),
    ],
)
def test_a_run_without_gates_to_look_at_says_so(
    options: dict[str, object], said: str, federate: Federate, tmp_path: Path
) -> None:
    run = federate(**{"num_server_rounds": 2, "local_epochs": 1, **options})
    with pytest.raises(UsageError, match=said):
        gates_of(RunModels(run.path))
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
