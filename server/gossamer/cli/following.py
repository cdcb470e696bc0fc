"""A job's log, read from a server and shown as it grows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from gossamer.cli.errors import CommandError
from gossamer.cli.output import Output, percent
from gossamer.cli.watching import StepBar, clock, step_bar

if TYPE_CHECKING:
    from gossamer.cli.remote import Server

#: What a job does not leave again.
FINISHED = frozenset({"succeeded", "failed", "cancelled"})
#: Seconds between two looks; a worker writes of its steps once a second.
POLL_S = 1.0
#: Seconds that the server may be away, as while it starts anew, until nobody waits for it.
PATIENCE_S = 120.0
#: Events of one request.
_PAGE = 100

Job = dict[str, Any]
Event = Mapping[str, Any]


def job_path(job_id: str, below: str = "") -> str:
    """Where the API has a job, or something of it."""
    from gossamer.cli.remote import segment

    return f"/v1/fine_tuning/jobs/{segment(job_id)}{below}"


def show_log(server: Server, job_id: str, output: Output) -> None:
    """All events so far, the oldest first."""
    for event in _events(server, job_id, None):
        output.result(event, line_of(event))


def follow(server: Server, job_id: str, output: Output) -> Job:
    """Show the events, those to come too, until the job is finished; the job as it is then.

    Ctrl-C ends the showing; the job goes on.
    """
    try:
        with step_bar(output) as bar:
            return _follow(server, job_id, _Display(output, bar))
    except KeyboardInterrupt:
        output.note(f"\nThe job goes on; `gossamer jobs logs -f {job_id}` follows it again.")
        raise


def conclude(job: Job, output: Output) -> None:
    """Say how a finished job ended.

    Raises:
        CommandError: it did not succeed.
    """
    name = job["fine_tuned_model"]
    text = f"{job['id']} succeeded: `gossamer chat --model {name}` talks to {name}."
    output.result(job, text if name else "")
    if job["status"] == "failed":
        error = job["error"] or {}
        remedy = "Correct what the line above names, then create the job again."
        if error.get("code") == "internal_error":
            remedy = "Look into the worker's log."
        raise CommandError(
            f"The job {job['id']} failed.", error.get("message") or "No reason is known.", remedy
        )
    if job["status"] == "cancelled":
        raise CommandError(
            f"The job {job['id']} was cancelled.", "Somebody asked for it.", "Create it again."
        )


def line_of(event: Event) -> str:
    """An event in one line for people."""
    moment = datetime.fromtimestamp(event["created_at"]).astimezone().strftime("%H:%M:%S")
    level = "" if event["level"] == "info" else f"{event['level']}: "
    return f"{moment}  {level}{event['message']}"


def _follow(server: Server, job_id: str, display: _Display) -> Job:
    from gossamer.cli.remote import Unavailable

    last: str | None = None
    heard: float | None = None
    while True:
        try:
            # The job first: what it did before it was finished is in the log by now.
            job = server.call("GET", job_path(job_id))
            for event in _events(server, job_id, last):
                display.show(event, job)
                last = event["id"]
            heard = time.monotonic()
        except Unavailable:
            if heard is None or time.monotonic() - heard > PATIENCE_S:
                raise
        else:
            if job["status"] in FINISHED:
                return job
        time.sleep(POLL_S)


def _events(server: Server, job_id: str, after: str | None) -> Iterator[Event]:
    """Those behind `after`, the oldest first, page by page."""
    return server.pages(job_path(job_id, "/events"), after, order="asc", limit=_PAGE)


class _Display:
    """Events as lines; on a terminal those of steps as a bar below the lines."""

    def __init__(self, output: Output, bar: StepBar) -> None:
        self._output = output
        self._bar = bar
        # Lines that are collected somewhere are all of them, whether there is a bar or not.
        live = bar.is_drawn and sys.stdout.isatty()
        self._say: Callable[[str], None] | None = bar.say if live else None

    def show(self, event: Event, job: Job) -> None:
        data = event.get("data") or {}
        is_step = "step" in data and "train_loss" in data
        if is_step:
            self._move(data, job)
        if self._say is None:
            self._output.result(event, line_of(event))
        elif not is_step:
            self._say(line_of(event) + _measured(data))

    def _move(self, data: Mapping[str, Any], job: Job) -> None:
        figures = []
        if data["train_loss"] is not None:
            figures.append(f"loss {data['train_loss']:.3f}")
        if data.get("tokens_per_second") is not None:
            figures.append(f"{data['tokens_per_second']:.0f} tok/s")
        if job.get("estimated_finish") is not None:
            figures.append(f"{clock(max(0.0, job['estimated_finish'] - time.time()))} left")
        what = data.get("phase") or "train"
        self._bar.move(data["step"], data.get("total_steps"), what, "  ".join(figures))


def _measured(data: Mapping[str, Any]) -> str:
    """What an evaluation says besides its loss."""
    shares = (
        ("token accuracy", "valid_mean_token_accuracy"), ("exact match", "valid_exact_match"),
    )  # fmt: skip
    return "".join(
        f", {name} {percent(data[key])}" for name, key in shares if data.get(key) is not None
    )
