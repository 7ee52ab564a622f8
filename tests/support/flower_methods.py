"""Many runs in one Flower simulation: Ray, which takes seconds to start, is started once.

python -m support.flower_methods RUNS.json: a list of run configs, each a whole run of the app.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from pfedmoap_flwr.federation import client
from pfedmoap_flwr.federation.server import serve

RUNS = Path(sys.argv[1]) if __name__ == "__main__" else None
RECORD = "run-config"

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve one run after the other; each message says in which settings it is to be answered."""
    assert RUNS is not None
    send = grid.send_and_receive
    for run_config in json.loads(RUNS.read_text()):
        record = ConfigRecord({"json": json.dumps(run_config)})

        def named(
            messages: Iterable[Message], record: ConfigRecord = record, **options: Any
        ) -> Iterable[Message]:
            messages = list(messages)
            for message in messages:
                message.content[RECORD] = record
            return send(messages, **options)

        grid.send_and_receive = named
        serve(grid, replace(context, run_config=run_config))


@client_app.query()
@client_app.train()
@client_app.evaluate()
def reply(message: Message, context: Context) -> Message:
    """Answer one message in the settings it came with."""
    run_config = json.loads(str(message.content[RECORD]["json"]))
    return client.answer([(message, replace(context, run_config=run_config))])[0]


if __name__ == "__main__":
    nodes = int(json.loads(Path(sys.argv[1]).read_text())[0]["data.num-clients"])
    resources = {"client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, nodes, backend_config=resources)
