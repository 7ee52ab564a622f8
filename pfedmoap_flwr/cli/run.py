"""pfedmoap run: one method, one seed."""

import functools
from collections.abc import Mapping

from rich.console import Console

from pfedmoap_flwr import api
from pfedmoap_flwr.cli.bar import bar_of_rounds
from pfedmoap_flwr.cli.say import say
from pfedmoap_flwr.engines import Engine
from pfedmoap_flwr.report import tables
from pfedmoap_flwr.report.scores import print_scores
from pfedmoap_flwr.runs.scores import load_scores
from pfedmoap_flwr.settings import Value


def run_one(values: Mapping[str, Value], engine: Engine, retries: int, console: Console) -> None:
    """Run, and print the closing table and where the results are."""
    plan = api.plan(values)
    attempt = functools.partial(api.execute, engine=engine, console=console)
    if engine == "in-process":
        with bar_of_rounds(plan.settings.num_server_rounds):
            result = api.persist(plan, attempt, retries, console)
    else:
        say(console, f"results in {plan.run_dir}")
        result = api.persist(plan, attempt, retries, console)
    tables.print_summary(result.summary, console)
    if found := load_scores(result.folder):
        print_scores(found, console)
    say(console, f"results in {result.folder}")
