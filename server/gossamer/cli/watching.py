"""What `gossamer train` shows while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gossamer.cli.output import Output, percent, print_json, size

if TYPE_CHECKING:
    from rich.progress import Progress

    from gossamer.training import Evaluation, Started, Step, Watcher

#: Without a terminal: a line for every tenth of the way.
_LINES = 10


@contextmanager
def watching(output: Output) -> Iterator[Watcher]:
    """A watcher that draws a bar on a terminal, writes a few lines to standard error without one,
    and JSON lines to standard output when that was asked for."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

    columns = (
        "{task.description}",
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with output.progress(*columns) as bars:
        yield _Watcher(output, bars)


class _Watcher:
    def __init__(self, output: Output, bars: Progress) -> None:
        self._output = output
        self._bars = bars
        self._task: Any = None

    def started(self, event: Started) -> None:
        density = event.density
        document = {
            "event": "started",
            **asdict(event),
            "density_of_model": density.of_model,
            "density_of_targets": density.of_targets,
        }
        self._tell(
            document,
            f"{event.method}: {density.nnz:,} values in {event.weights} weights, "
            f"{percent(density.of_model)} of the model and {percent(density.of_targets)} of these "
            f"weights; {event.examples:,} examples, {event.held_out:,} held out, "
            f"{event.dropped:,} too long; learning rate {event.learning_rate:g}; {event.device}.",
        )
        self._task = self._bars.add_task("training", total=event.steps, figures="")

    def stepped(self, event: Step) -> None:
        figures = (
            f"loss {event.loss:.3f}  {event.tokens_per_second:.0f} tok/s  "
            f"{_clock(event.eta)} left  {event.nnz:,} nnz  {size(event.memory)}"
        )
        self._bars.update(self._task, completed=event.step, figures=figures)
        tenths = event.step * _LINES // event.steps, (event.step - 1) * _LINES // event.steps
        line = f"step {event.step}/{event.steps}  {figures}"
        quiet = not self._bars.disable or tenths[0] == tenths[1]
        self._tell({"event": "step", **asdict(event)}, "" if quiet else line)

    def evaluated(self, event: Evaluation) -> None:
        self._tell(
            {"event": "evaluation", **asdict(event)},
            f"after step {event.step}: held-out loss {event.loss:.3f}, "
            f"token accuracy {percent(event.token_accuracy)}",
        )

    def _tell(self, document: dict[str, Any], line: str) -> None:
        if self._output.as_json:
            print_json(document)
        elif not line:
            return
        elif self._bars.disable:
            self._output.note(line)
        else:
            self._bars.console.print(line, highlight=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
