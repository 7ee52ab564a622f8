"""Run folders written by hand, as a run leaves them, in milliseconds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pfedmoap_flwr import config
from pfedmoap_flwr.runs.choice import MODELS
from pfedmoap_flwr.runs.folder import summarise
from pfedmoap_flwr.runs.record import Round

Accuracies = Sequence[Sequence[float]]
"""By round, then by client; round 0 first."""


def write_run(
    folder: Path,
    method: str,
    seed: int,
    personal: Accuracies,
    *,
    end: str = "done",
    flat: Mapping[str, Any] | None = None,
    classnames: Sequence[str] = ("cat", "dog"),
    domain: str = "",
    partition: str = "",
    validation: float | None = None,
    memory: int | None = None,
) -> Path:
    """Write a run whose global accuracy is half of the personal one, zero-shot 0.2 for everyone.

    end: "done", "half" for a run that was stopped, or the reason why it failed. validation: of both
    models of everybody. memory: what each client's process held.
    """
    folder.mkdir(parents=True)
    asked = len(personal) - 1 + (end == "half")
    values = {"method": method, "seed": seed, "num-server-rounds": asked, **(flat or {})}
    settings = config.parse(values)
    rounds = [_round(number, row) for number, row in enumerate(personal)]
    if memory is not None:
        for record in rounds[1:]:
            record.memory = dict.fromkeys(record.bytes_up, memory)
    if validation is not None:
        for measured in (m for record in rounds for m in record.clients.values()):
            measured |= {f"{model}-validation-accuracy": validation for model in MODELS}
    clients = [
        {"client": client, "domain": domain, "classes": {"train": [3, 1]}}
        for client in range(len(personal[0]))
    ]
    said = {"classnames": list(classnames), "clients": clients, "sha256": partition or f"s{seed}"}
    (folder / "settings.json").write_text(json.dumps(settings.flat()))
    (folder / "rounds.jsonl").write_text("".join(r.to_json() + "\n" for r in rounds))
    (folder / "partition.json").write_text(json.dumps(said))
    made = {"commit": "abc123", "device": "cpu", "torch": "2.9", "started": "2026-11-29T05:00:00"}
    (folder / "environment.json").write_text(json.dumps(made))
    if end == "done":
        (folder / "summary.json").write_text(json.dumps(summarise(settings, rounds)))
    elif end != "half":
        (folder / "error.txt").write_text(f"Traceback\n  somewhere\n{end}\n")
    return folder


def _round(number: int, accuracies: Sequence[float]) -> Round:
    record = Round(number, seconds=1.5)
    for client, accuracy in enumerate(accuracies):
        measured = {"personal-accuracy": accuracy, "global-accuracy": accuracy / 2}
        record.clients[client] = measured | ({"zeroshot-accuracy": 0.2} if not number else {})
        if number:
            record.bytes_down[client], record.bytes_up[client] = 8000, 2000
    return record
