"""pfedmoap run: one method, one seed."""

from collections.abc import Mapping

from rich.console import Console

from pfedmoap_flwr import api
from pfedmoap_flwr.engines import Engine
from pfedmoap_flwr.report import tables
from pfedmoap_flwr.settings import Value


def run_one(values: Mapping[str, Value], engine: Engine, console: Console) -> None:
    """Run, and print the closing table and where the results are."""
    plan = api.plan(values)
    console.print(f"results in {plan.run_dir}", highlight=False, soft_wrap=True)
    result = api.execute(plan, engine, console)
    tables.print_summary(result.summary, console)
    console.print(f"results in {result.folder}", highlight=False, soft_wrap=True)
