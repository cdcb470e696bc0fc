"""The progress bars that several commands draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gossamer.cli.output import Output

if TYPE_CHECKING:
    from gossamer.base.fetch import Progress, Stage

#: What the stages of opening a base are called in a bar.
_STAGES: dict[Stage, str] = {
    "wait": "waiting for another process",
    "download": "fetching the base model",
    "unpack": "unpacking it",
    "convert": "converting it to float32",
    "check": "checking it",
    "publish": "storing it",
    "fingerprint": "fingerprinting it",
}


@contextmanager
def transfer(output: Output, what: str, total: int | None) -> Iterator[Any]:
    """A bar for a transfer, with bytes, speed and the time left; yields `advance(nbytes)`."""
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with output.progress(*columns) as bars:
        task = bars.add_task(what, total=total)
        yield lambda nbytes: bars.advance(task, nbytes)


@contextmanager
def base_stages(output: Output) -> Iterator[Progress]:
    """A bar for every stage of opening a base; yields what `open_base` reports to."""
    from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with output.progress(*columns) as bars:
        tasks: dict[Stage, Any] = {}

        def report(stage: Stage, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES[stage], total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report
