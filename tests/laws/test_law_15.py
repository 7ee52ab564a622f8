"""Law 15: a question changes nothing; an evaluation leaves every byte on disk as it was."""

import shutil
from collections.abc import Callable
from pathlib import Path

from pfedmoap_flwr.engines.in_process import make_context
from pfedmoap_flwr.federation import client
from pfedmoap_flwr.runs.folder import load_settings
from pfedmoap_flwr.settings import Value
from support.federation import Recorded
from support.laws import THREE_ROUNDS, every_method


def on_disk(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file with the time when it was written and its bytes, and every folder."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


@every_method
def test_15_evaluation_writes_and_deletes_nothing(
    method: str, recorded: Callable[..., Recorded], tmp_path: Path
) -> None:
    three = recorded(method=method, **THREE_ROUNDS)
    # A copy, for other laws read the run
    folder = shutil.copytree(three.run.path, tmp_path / "run")
    before = on_disk(tmp_path)
    assert list(tmp_path.rglob("client-*/round-00003.safetensors"))
    flat = load_settings(folder).flat()
    flat |= {"run-dir": str(folder), "state-dir": str(folder / "clients")}
    asked = [exchange for exchange in three.wire if exchange.kind == "evaluate"]
    # Of every round: a question of round 0 once cleared the heads
    assert {exchange.round for exchange in asked} == {0, 1, 2, 3}
    for exchange in asked:
        node: dict[str, Value] = {"partition-id": exchange.client, "num-partitions": 4}
        (reply,) = client.answer([(exchange.message, make_context(1, node, flat))])
        assert reply.has_content()
    assert on_disk(tmp_path) == before
