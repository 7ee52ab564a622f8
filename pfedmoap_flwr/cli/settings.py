"""pfedmoap settings: all that can be set, by group."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pfedmoap_flwr import config, methods
from pfedmoap_flwr.errors import UsageError
from pfedmoap_flwr.settings import FieldInfo, Value, help_line, limits, reject_unknown

GENERAL = "general"


def print_settings(prefix: str, console: Console) -> None:
    """Print key, default and meaning of the settings whose keys begin so.

    Raises UsageError where there are none.
    """
    # A method's settings lie in its module: importing all of them takes seconds
    named = [name for name in methods.names() if not prefix or name == prefix.partition(".")[0]]
    known = config.known_fields(named)
    shown = {key: field for key, field in known.items() if key.startswith(prefix)}
    if not shown:
        raise UsageError(f"no setting begins with '{prefix}'; `pfedmoap settings` lists all")
    groups: dict[str, dict[str, FieldInfo]] = {}
    for key, field in shown.items():
        groups.setdefault(key.rpartition(".")[0] or GENERAL, {})[key] = field
    for number, (group, fields) in enumerate(groups.items()):
        if number:
            console.print()
        console.print(f"[bold]{group}[/]", highlight=False)
        console.print(_table(fields))
