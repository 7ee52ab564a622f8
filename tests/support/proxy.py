"""nginx with the kit's configuration, where it is installed; and that configuration's text."""

import re
import shutil
from pathlib import Path

NGINX = shutil.which("nginx")


def locations(text: str) -> dict[str, str]:
    """Return each location of a server block with what stands in it."""
    found: dict[str, str] = {}
    for match in re.finditer(
        r"^    location (\S+) \{\n(.*?)^    \}", text, re.MULTILINE | re.DOTALL
    ):
        found[match[1]] = match[2]
    return found


def closed(body: str) -> bool:
    """Say whether a location answers nothing but that there is nothing."""
    return body.split() == ["return", "404;"]


def nginx_command(server: Path, folder: Path) -> list[str]:
    """Return how to start nginx in the foreground with a server folder's configuration.

    All that it writes lies in `folder`; it runs as whoever starts it.
    """
    writes = "".join(
        f"{name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "main.conf").write_text(
        f"daemon off;\nworker_processes 1;\npid {folder}/pid;\nerror_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\naccess_log {folder}/access.log;\n{writes}"
        f"include {server}/nginx.conf;\n}}\n"
    )
    assert NGINX
    return [NGINX, "-e", str(folder / "error.log"), "-c", str(folder / "main.conf")]
