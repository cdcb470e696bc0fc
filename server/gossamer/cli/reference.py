"""docs/cli.md: every command's `--help`, as it is. `python -m gossamer.cli.reference docs/cli.md`
writes it; a test checks that what is checked in is current."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEAD = """\
# The command line

This page is generated from the commands themselves:
`python -m gossamer.cli.reference docs/cli.md`.

What a command finds goes to standard output, everything else to standard error. With `--json`
standard output is JSON only: one document on one line, or one a line as things happen
(`gossamer train`, `gossamer chat` without `--message`). Progress bars are drawn on a terminal only.
A command that fails says in three lines what happened, why, and what to do.

| exit code | |
|---|---|
| 0 | done |
| 1 | it could not be done |
| 2 | the command was not typed right |
| 130 | interrupted |

`GOSSAMER_URL` and `GOSSAMER_API_KEY` stand in for `--url` and `--key`; the server's own settings
are environment variables too ([api.md](api.md)).
"""
#: Wide enough for an option and its help side by side.
_WIDTH = 96


def render() -> str:
    """The page."""
    from typer.main import get_command

    from gossamer.cli.app import app

    root = get_command(app)
    sections = [_HEAD]
    for path, text in _pages(root, "gossamer", None):
        sections.append(f"\n{'#' * (1 + len(path.split()))} {path}\n\n```\n{text}\n```\n")
    return "".join(sections)


def _pages(command: Any, name: str, parent: Any) -> Iterator[tuple[str, str]]:
    context = command.context_class(
        command, info_name=name, parent=parent, terminal_width=_WIDTH, max_content_width=_WIDTH
    )
    with context:
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield context.command_path, text
    for child_name, child in getattr(command, "commands", {}).items():
        yield from _pages(child, child_name, context)


def main() -> None:
    """Write the page to the file that the first argument names."""
    Path(sys.argv[1]).write_text(render())


if __name__ == "__main__":
    main()
