"""The server's state on disk: one safetensors file with a JSON header, replaced as a whole."""

import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import Server

FILE = "checkpoint.safetensors"


def save(server: Server, run_dir: Path) -> None:
    """Write the state so that a reader sees the old or the new one, never a torn one."""
    tensors = {f"shared/{name}": tensor for name, tensor in server.shared.items()}
    tensors |= {f"extra/{name}": tensor for name, tensor in server.extra.items()}
    for client, upload in server.pool.items():
        tensors |= {f"pool/{client}/{name}": tensor for name, tensor in upload.items()}
    state = {
        "round": server.round,
        "examples": server.examples,
        # A client may have uploaded no tensors at all, and still be in the pool
        "pool": sorted(server.pool),
    }
    temporary = run_dir / f"{FILE}.tmp"
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, temporary, metadata={"state": json.dumps(state)})
    os.replace(temporary, run_dir / FILE)


def load(run_dir: Path) -> Server:
    """Read a state back, bit for bit. Raises UsageError where there is none."""
    path = run_dir / FILE
    if not path.is_file():
        raise UsageError(f"resume={run_dir}: no {FILE} there; give the folder of an earlier run")
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
        server = Server(
            shared={},
            pool={client: {} for client in state["pool"]},
            examples={int(client): n for client, n in state["examples"].items()},
            round=state["round"],
        )
        for key in file.keys():  # noqa: SIM118 - not a dict
            kind, _, name = key.partition("/")
            if kind == "pool":
                client, _, name = name.partition("/")
                server.pool[int(client)][name] = file.get_tensor(key)
            else:
                getattr(server, kind)[name] = file.get_tensor(key)
    return server
