"""The server's state on disk: a safetensors file with a JSON header, and the one of a round before.

The header has the run's id and a digest of everything else. A file is replaced as a whole; the old
one becomes the generation before, from which a run goes on where the newest one is damaged.
"""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pfedmoap_flwr import files
from pfedmoap_flwr.errors import RunFailed, UsageError
from pfedmoap_flwr.methods.base import ServerState

FILE = "checkpoint.safetensors"
BEFORE = "checkpoint-before.safetensors"
logger = logging.getLogger("flwr.pfedmoap")


def save(state: ServerState, run_dir: Path, run_id: str) -> None:
    """Write the state so that a reader sees the old or the new one, never a torn one.

    run_id: of the run whose state it is; another one will not go on from it.

    Raises RunFailed where it is not finite: no run could go on from it. Raises OSError.
    """
    tensors = {f"shared/{name}": tensor for name, tensor in state.shared.items()}
    tensors |= {f"extra/{name}": tensor for name, tensor in state.extra.items()}
    for client_id, entry in state.pool.items():
        tensors |= {f"pool/{client_id}/{name}": tensor for name, tensor in entry.items()}
    if bad := _not_finite(tensors):
        raise RunFailed(
            f"round {state.round} left {bad} not finite and is not kept; resume={run_dir} repeats "
            "it: lower the learning rate, or leave out the client that uploads such numbers"
        )
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # A client's entry in the pool may have no tensors at all
    said = {"round": state.round, "pool": sorted(state.pool)}
    # One text: several entries would be written in an order of chance
    header = json.dumps({"run": run_id, **said, "digest": digest_of(said, copies)})
    content = safetensors.torch.save(copies, metadata={"state": header})
    files.replace(run_dir / FILE, content, before=run_dir / BEFORE)


def load(
    run_dir: Path, rounds: Collection[int] | None = None, run_id: str | None = None
) -> ServerState:
    """Read the newest state that is whole, bit for bit, and say so where it is the one before.

    rounds: those on record; a state of another round cannot be gone on from.
    run_id: of the run; another run's state is none. None: any.
    Raises UsageError where there is none.
    """
    return _newest(run_dir, rounds, run_id)[1]


def restore(run_dir: Path, rounds: Collection[int], run_id: str) -> None:
    """Put what `load` reads in the place of a newer, damaged one."""
    path, _ = _newest(run_dir, rounds, run_id)
    if path.name != FILE:
        # The next save would make the damaged one the generation before
        os.replace(path, run_dir / FILE)


def check_like(state: ServerState, start: ServerState, clients: int) -> None:
    """Raise UsageError where a state is not one that a run which began so can have come to."""
    for name in state.shared.keys() & start.shared.keys():
        came, own = tuple(state.shared[name].shape), tuple(start.shared[name].shape)
        if came != own:
            raise UsageError(f"{FILE} is another run's: {name} has shape {came}, not {own}")
    if start.shared.keys() - state.shared.keys() or not state.pool.keys() <= set(range(clients)):
        raise UsageError(
            f"{FILE} is another run's: it holds {sorted(state.shared)} of clients "
            f"{sorted(state.pool)}; put this run's back from a copy"
        )


def is_there(run_dir: Path) -> bool:
    """Tell whether a folder has a state of a run, be it the one before the newest."""
    return any((run_dir / name).exists() for name in (FILE, BEFORE))


def check_there(run_dir: Path) -> None:
    """Raise UsageError where a folder has no state of a run at all."""
    if not is_there(run_dir):
        raise UsageError(f"resume={run_dir}: no {FILE} there; give the folder of an earlier run")


def _newest(
    run_dir: Path, rounds: Collection[int] | None, run_id: str | None
) -> tuple[Path, ServerState]:
    check_there(run_dir)
    reasons = []
    for path in (run_dir / FILE, run_dir / BEFORE):
        try:
            state = read(path, run_id)
            if rounds is not None and state.round not in rounds:
                raise ValueError(f"is of round {state.round}, which rounds.jsonl does not have")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            text = error.strerror if isinstance(error, OSError) else str(error)
            reasons.append(f"{path.name}: {text or type(error).__name__}")
            continue
        if reasons:
            logger.warning("%s; the run goes on from round %d", "; ".join(reasons), state.round)
        return path, state
    raise UsageError(
        f"resume={run_dir}: no checkpoint can be read ({'; '.join(reasons)}); put "
        f"{run_dir / FILE} back from a copy, or start the run anew in another folder"
    )


def read(path: Path, run_id: str | None = None) -> ServerState:
    """Read a file whole. Raises ValueError where it is not what the run wrote; None: any run."""
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})["state"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    if "run" not in header:
        raise ValueError("was written by an earlier version")
    # Outside the digest: two runs that do the same leave the same digest
    if header.pop("run") != run_id and run_id is not None:
        raise ValueError("is another run's")
    if header.pop("digest") != digest_of(header, tensors):
        raise ValueError("is not what was written")
    if bad := _not_finite(tensors):
        raise ValueError(f"{bad} is not finite")
    pool: dict[int, dict[str, Tensor]] = {client_id: {} for client_id in header["pool"]}
    state = ServerState(shared={}, pool=pool, round=header["round"])
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "pool":
            client_id, _, name = name.partition("/")
            state.pool[int(client_id)][name] = tensor
        else:
            getattr(state, kind)[name] = tensor
    return state


def digest_of(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return the first tensor that is no number; a bound in `extra` may be infinite."""
    for name, tensor in tensors.items():
        bad = tensor.isnan() if name.startswith("extra/") else ~tensor.isfinite()
        if bad.any():
            return name
    return ""
