"""Where a command's words go: results to standard output, everything else to standard error.

With `--json` a result is one JSON document a line, and nothing else is on standard output. Progress
bars are drawn on a terminal only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from gossamer.cli.errors import CommandError


class Output:
    """The two streams of one command.

    Args:
        as_json: results are JSON for programs, not text for people.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def result(self, document: Mapping[str, Any] | Sequence[Any], text: str = "") -> None:
        """One result: `document` for programs, `text` for people (nothing when it is empty)."""
        if self.as_json:
            print_json(document)
        elif text:
            write(sys.stdout, text + "\n")

    def note(self, text: str) -> None:
        """A remark beside the result, for people only."""
        if not self.as_json:
            write(sys.stderr, text + "\n")

    @contextmanager
    def progress(self, *columns: str | ProgressColumn) -> Iterator[Progress]:
        """Bars on standard error while the block runs; invisible unless that is a terminal."""
        from rich.console import Console
        from rich.progress import Progress

        visible = sys.stderr.isatty() and not self.as_json
        with Progress(*columns, console=Console(stderr=True), disable=not visible) as bars:
            yield bars


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """Rows under their heads, aligned; the columns in `numbers` to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    right = [name in numbers for name in head]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def print_json(document: Any) -> None:
    """One JSON document on one line of standard output."""
    write(sys.stdout, json.dumps(document, ensure_ascii=False) + "\n")


def write(stream: TextIO, text: str) -> None:
    """Write now, so that a reader at the other end of a pipe sees it at once."""
    stream.write(text)
    stream.flush()


def show_error(error: CommandError) -> None:
    """The three lines, on standard error."""
    write(sys.stderr, f"Error: {error}\n")


def size(nbytes: float) -> str:
    """Bytes for people: `12.3 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def percent(share: float) -> str:
    """A density for people: `0.5 %`, to three digits."""
    return f"{100 * share:.3g} %"


def when(seconds: int) -> str:
    """A time of the server in the local time zone, to the minute."""
    from datetime import datetime

    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
