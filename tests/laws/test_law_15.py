"""Law 15: a question changes nothing; an evaluation leaves every byte on disk as it was."""

from pathlib import Path

from pfedmoap_flwr.engines.in_process import make_context
from pfedmoap_flwr.federation import client
from pfedmoap_flwr.runs.folder import load_settings
from pfedmoap_flwr.settings import Value
from support.federation import Exchange, Federate
from support.laws import every_method


def on_disk(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file with the time when it was written and its bytes, and every folder."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


@every_method
def test_15_evaluation_writes_and_deletes_nothing(
    method: str, federate: Federate, wire: list[Exchange], tmp_path: Path
) -> None:
    run = federate(method=method, local_epochs=1, batch_size=16)
    before = on_disk(tmp_path)
    assert list(tmp_path.rglob("client-3/round-00002.safetensors"))
    flat = load_settings(run.path).flat()
    asked = [exchange for exchange in wire if exchange.kind == "evaluate"]
    # Of every round: a question of round 0 once cleared the heads
    assert {exchange.round for exchange in asked} == {0, 1, 2}
    for exchange in asked:
        node: dict[str, Value] = {"partition-id": exchange.client, "num-partitions": 4}
        (reply,) = client.answer([(exchange.message, make_context(1, node, flat))])
        assert reply.has_content()
    assert on_disk(tmp_path) == before
