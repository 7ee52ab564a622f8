"""pfedmoap settings: all that can be set, by group."""

from collections.abc import Mapping

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.settings import help_line, limits

GENERAL = "general"


def print_settings(prefix: str, console: Console) -> None:
    """Print key, default and meaning of the settings whose keys begin so.

    Raises UsageError where there are none.
    """
    # A method's settings lie in its module, and the first import of one takes seconds
    group = prefix.partition(".")[0]
    meant = [name for name in methods.names() if name.startswith(group)]
    groups: dict[str, dict[str, FieldInfo]] = {}
    for key, field in config.known_fields(meant).items():
        if key.startswith(prefix):
            groups.setdefault(key.rpartition(".")[0] or GENERAL, {})[key] = field
    if not groups:
        raise UsageError(f"no setting begins with '{prefix}'; `pfedmoap settings` lists all")
    for number, (group, fields) in enumerate(groups.items()):
        if number:
            console.print()
        console.print(Text(group, style="bold"))
        console.print(_table(fields))


def _table(fields: Mapping[str, FieldInfo]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(ratio=1)
    for key, field in fields.items():
        table.add_row(Text(key), Text(config.to_toml(field.default)), Text(_meaning(key, field)))
    return table


def _meaning(key: str, field: FieldInfo) -> str:
    if key == "method":
        return f"{field.description}: {' | '.join(methods.names())}"
    bounds = ", ".join(limit.replace(" ", "") for limit in limits(field))
    return f"{help_line(field)} ({bounds})" if bounds else help_line(field)
