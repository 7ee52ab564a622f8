"""The server's state on disk: one safetensors file with a JSON header, replaced as a whole."""

import json
from pathlib import Path

import safetensors.torch
from safetensors import safe_open

from pfedmoap_flwr import files
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.methods.base import ServerState

FILE = "checkpoint.safetensors"


def save(state: ServerState, run_dir: Path) -> None:
    """Write the state so that a reader sees the old or the new one, never a torn one."""
    tensors = {f"shared/{name}": tensor for name, tensor in state.shared.items()}
    tensors |= {f"extra/{name}": tensor for name, tensor in state.extra.items()}
    for client_id, entry in state.pool.items():
        tensors |= {f"pool/{client_id}/{name}": tensor for name, tensor in entry.items()}
    # A client's entry in the pool may have no tensors at all
    header = json.dumps({"round": state.round, "pool": sorted(state.pool)})
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    files.replace(run_dir / FILE, safetensors.torch.save(copies, metadata={"state": header}))


def load(run_dir: Path) -> ServerState:
    """Read a state back, bit for bit. Raises UsageError where there is none."""
    path = run_dir / FILE
    if not path.is_file():
        raise UsageError(f"resume={run_dir}: no {FILE} there; give the folder of an earlier run")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["state"])
        state = ServerState(
            shared={}, pool={client_id: {} for client_id in header["pool"]}, round=header["round"]
        )
        for key in file.keys():  # noqa: SIM118 - not a dict
            kind, _, name = key.partition("/")
            if kind == "pool":
                client_id, _, name = name.partition("/")
                state.pool[int(client_id)][name] = file.get_tensor(key)
            else:
                getattr(state, kind)[name] = file.get_tensor(key)
    return state
