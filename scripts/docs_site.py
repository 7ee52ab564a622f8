"""Hooks of mkdocs.yml: pages of a folder that nobody lists by hand, and links out of the site."""

import posixpath
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:)([^)#\s]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Let an entry of the nav that ends with / mean all pages of that folder."""
    config.nav = [_listed(entry, Path(config.docs_dir)) for entry in config.nav]
    return config


def _listed(entry: Any, docs: Path) -> Any:
    if isinstance(entry, list):
        return [_listed(each, docs) for each in entry]
    if isinstance(entry, dict):
        return {title: _listed(each, docs) for title, each in entry.items()}
    if entry.endswith("/"):
        # README.md is the folder's own page, so it comes first
        pages = sorted((docs / entry).glob("*.md"), key=lambda p: (p.stem != "README", p.stem))
        return [page.relative_to(docs).as_posix() for page in pages]
    return entry


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Show a link to a file of the repository as its path: on the site it leads nowhere."""
    here = posixpath.dirname(page.file.src_uri)

    def shown(match: re.Match[str]) -> str:
        text, file, _ = match.groups()
        target = posixpath.normpath(posixpath.join(here, file))
        if not target.startswith("../"):
            return match.group()
        path = target.removeprefix("../")
        return text if path in text else f"{text} (`{path}`)"

    return LINK.sub(shown, markdown)
