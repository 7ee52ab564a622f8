"""Real SuperNodes, each with a folder of its own: `data-dir` in --node-config."""

import json
from pathlib import Path
from typing import Any

import pytest

from pfedmoap_flwr.engines.simulation import free_port
from pfedmoap_flwr.runs.folder import RunFolder
from support.copies import write_tree
from support.deployment import processes, wait_for_port
from support.tiny import TINY

pytestmark = pytest.mark.processes

SETTINGS: dict[str, Any] = {
    **TINY,
    "data.num-clients": 2,
    "data.classnames": "cat,dog,red panda",
    "num-server-rounds": 1,
    "local-epochs": 1,
}


def test_two_nodes_with_their_own_images(tmp_path: Path) -> None:
    # A space in the path, a class that one node lacks
    dirs = [tmp_path / "images of 0", tmp_path / "images-of-1"]
    write_tree(dirs[0], {"cat": 10, "red_panda": 10})
    write_tree(dirs[1], {"cat": 20, "dog": 20, "red_panda": 20})
    run_dir, port = tmp_path / "run", free_port()
    with processes(tmp_path) as started:
        (tmp_path / "flower" / "config.toml").write_text(
            f'[superlink.dep]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        superlink = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        superlink += ["--database", str(tmp_path / "state.db")]
        started.start("superlink", [*superlink, "--disable-runtime-dependency-installation"])
        wait_for_port(port)
        for client, images in enumerate(dirs):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
            node += ["--port", str(free_port()), "--node-config"]
            place = f'data-dir="{images}" state-dir="{tmp_path / f"state-{client}"}"'
            started.start(f"supernode-{client}", [*node, f"partition-id={client} {place}"])
        status = started.flwr_run("dep", {**SETTINGS, "run-dir": str(run_dir)}, run_dir)
    assert status == "finished:completed"
    run = RunFolder(run_dir)
    assert not any(record.failed for record in run.rounds())
    assert set(run.rounds()[1].clients) == {0, 1}
    said = json.loads((run_dir / "data.json").read_text())
    sizes = {tuple(data["clients"]): data["sizes"]["train"] for data in said}
    assert sizes == {(0,): 14, (1,): 42}
