"""pfedmoap compare: several methods over several seeds, all else equal."""

from collections.abc import Mapping, Sequence

from rich.console import Console

from pfedmoap_flwr import api
from pfedmoap_flwr.report import tables
from pfedmoap_flwr.settings import Value


def compare_all(
    methods: Sequence[str], seeds: Sequence[int], values: Mapping[str, Value], console: Console
) -> None:
    """Run all, and print mean and spread of each method and where the results are."""
    plans = api.plan_all(methods, seeds, values)
    results = api.execute_all(plans, console)
    summaries = {name: [result.summary for result in runs] for name, runs in results.items()}
    tables.print_comparison(summaries, console)
    console.print(f"results in {plans[0].run_dir.parent}", highlight=False, soft_wrap=True)
