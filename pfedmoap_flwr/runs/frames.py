"""What a run recorded, as tables of pandas."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pfedmoap_flwr.runs.record import Round


def rounds_frame(rounds: Sequence[Round]) -> pd.DataFrame:
    """Return a row per round, by its number: means of accuracies, loss, bytes, counts.

    trained, failed: how many clients. bytes_down, bytes_up: of all of them. After these the
    method's own numbers. What a round did not measure is NaN.
    """
    names = dict.fromkeys(
        name for record in rounds for own in record.clients.values() for name in own
    )
    rows = [
        {
            "round": record.round,
            **{name.replace("-", "_"): record.mean(name) for name in names},
            "train_loss": record.train_loss,
            "trained": len(record.bytes_up),
            "failed": len(record.failed),
            "bytes_down": sum(record.bytes_down.values()),
            "bytes_up": sum(record.bytes_up.values()),
            "seconds": record.seconds,
            **{name.replace("-", "_"): value for name, value in record.metrics.items()},
        }
        for record in rounds
    ]
    accuracies = [name.replace("-", "_") for name in names]
    table = pd.DataFrame(rows).set_index("round")
    return table.astype(dict.fromkeys([*accuracies, "train_loss"], float))


def clients_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the lines of clients.csv by client; NaN where a client has no such number."""
    return pd.DataFrame(list(rows)).set_index("client")
