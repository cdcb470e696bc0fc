"""What is shown of a run while it goes on: by `gossamer train`, and of a job that is followed."""

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


class StepBar:
    """A bar for the steps of a run, and lines above it; without a terminal just the lines, on
    standard error."""

    def __init__(self, output: Output, bars: Progress) -> None:
        self._output = output
        self._bars = bars
        self._task: Any = None

    @property
    def is_drawn(self) -> bool:
        """Whether there is a terminal to draw it on."""
        return not self._bars.disable

    def move(self, step: int, steps: int | None, what: str, figures: str = "") -> None:
        """Show that `step` of `steps` is done, with `what` before the bar and figures behind it."""
        if self._task is None:
            self._task = self._bars.add_task(what, total=steps, figures=figures)
        self._bars.update(
            self._task, completed=step, total=steps, description=what, figures=figures
        )

    def say(self, line: str) -> None:
        """A line that stays."""
        if self.is_drawn:
            self._bars.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            self._output.note(line)


@contextmanager
def step_bar(output: Output) -> Iterator[StepBar]:
    """A bar that is there while the block runs."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with output.progress(*columns) as bars:
        yield StepBar(output, bars)


@contextmanager
def watching(output: Output) -> Iterator[Watcher]:
    """A watcher that draws a bar on a terminal, writes a few lines to standard error without one,
    and JSON lines to standard output when that was asked for."""
    with step_bar(output) as bar:
        yield _Watcher(output, bar)


class _Watcher:
    def __init__(self, output: Output, bar: StepBar) -> None:
        self._output = output
        self._bar = bar

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
            f"{event.dropped:,} too long; learning rate {event.learning_rate:g}; {event.device}."
            + _plan(event),
        )
        if event.warning and not self._output.as_json:
            self._bar.say(f"Warning: {event.warning}")
        self._bar.move(0, event.steps, next(iter(event.phases), "train"))

    def stepped(self, event: Step) -> None:
        figures = (
            f"loss {event.loss:.3f}  {event.tokens_per_second:.0f} tok/s  "
            f"{clock(event.eta)} left  {event.nnz:,} nnz  {size(event.memory)}"
        )
        self._bar.move(event.step, event.steps, event.phase, figures)
        tenths = event.step * _LINES // event.steps, (event.step - 1) * _LINES // event.steps
        line = f"step {event.step}/{event.steps}  {event.phase}  {figures}"
        quiet = self._bar.is_drawn or tenths[0] == tenths[1]
        self._tell({"event": "step", **asdict(event)}, "" if quiet else line)

    def evaluated(self, event: Evaluation) -> None:
        self._tell(
            {"event": "evaluation", **asdict(event)},
            f"after step {event.step}: held-out loss {event.loss:.3f}, "
            f"token accuracy {percent(event.token_accuracy)}, "
            f"exact match {percent(event.exact_match)}",
        )

    def _tell(self, document: dict[str, Any], line: str) -> None:
        if self._output.as_json:
            print_json(document)
        elif line:
            self._bar.say(line)


def _plan(event: Started) -> str:
    if len(event.phases) < 2:
        return ""
    return " Steps: " + ", then ".join(f"{name} {n}" for name, n in event.phases.items()) + "."


def clock(seconds: float) -> str:
    """A stretch of time for people: `1:05`, `2:00:07`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
