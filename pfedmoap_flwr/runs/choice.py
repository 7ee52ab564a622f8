"""What validation images choose: each client's personal or the global model, and the best round.

No test image has a say. Of equals, the personal model and the earlier round are taken.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pfedmoap_flwr.runs.record import Round, last_measured

MODELS = ("personal", "global")


def chosen(measured: Mapping[str, float]) -> str:
    """Return the model that is better on a client's validation images, "" where it has none."""
    known = [model for model in MODELS if f"{model}-validation-accuracy" in measured]
    return max(known, key=lambda model: measured[f"{model}-validation-accuracy"], default="")


def validated(record: Round) -> float | None:
    """Return the mean over clients of the chosen models' accuracy on validation images."""
    return _mean(record, "{}-validation-accuracy")


def best_round(rounds: Sequence[Round]) -> Round | None:
    """Return the round whose chosen models are best on validation images, of those measured."""
    known = [record for record in rounds if validated(record) is not None]
    return max(known, key=lambda record: validated(record) or 0.0, default=None)


def choices(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return what summary.json says of choices; nothing where nobody has validation images.

    chosen_accuracy: mean on test images after the last evaluation. best_round_accuracy: the same
    after the best round.
    """
    last, best = last_measured(rounds), best_round(rounds)
    if best is None or validated(last) is None:
        return {}
    return {
        "chosen_accuracy": _mean(last, "{}-accuracy"),
        "chose_personal": sum(chosen(m) == "personal" for m in last.clients.values()),
        "best_round": best.round,
        "best_round_accuracy": _mean(best, "{}-accuracy"),
    }


def _mean(record: Round, name: str) -> float | None:
    values = [
        measured[key]
        for measured in record.clients.values()
        if (model := chosen(measured)) and (key := name.format(model)) in measured
    ]
    return fmean(values) if values else None
