"""`gossamer worker`: carry out the training jobs of a data folder."""

from __future__ import annotations

import logging
import os
import socket
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli.options import AsJson, Base, DataDir, Threads, load_settings
from gossamer.cli.output import Output

if TYPE_CHECKING:
    from gossamer.api.settings import Settings

log = logging.getLogger(__name__)

#: Of the data folder: what unfinished jobs need to go on. Workers on one machine share it.
WORK = "work"
#: Seconds between two looks whether the process that started us is still there.
_PARENT_S = 1.0


def worker(
    base: Base = None,
    data_dir: DataDir = None,
    threads: Threads = None,
    lease: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1.0,
            max=3600.0,
            help="How long the worker may be silent until others take its job.",
        ),
    ] = 30.0,
    once: Annotated[bool, typer.Option("--once", help="End when the queue is empty.")] = False,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
    as_json: AsJson = False,
) -> None:
    """Carry out the training jobs that a server's tenants create, one at a time.

    It takes jobs for its base from the server's own database, and the server need not run. Several
    workers may. SIGTERM or Ctrl-C ends it after the step that it is at: the job is kept with a
    checkpoint and goes back into the queue; a second one ends it at once, and then the job is taken
    again when its lease has ended. Logs go to standard error, one JSON object a line.
    """
    output = Output(as_json)
    settings = load_settings(base=base, data_dir=data_dir, threads=threads)
    _work(settings, output, lease_s=lease, once=once, parent=parent)


def _work(
    settings: Settings, output: Output, *, lease_s: float, once: bool, parent: int | None
) -> None:
    from gossamer.api.logs import configure_logging
    from gossamer.base.sources import open_base
    from gossamer.cli.bars import base_stages
    from gossamer.cli.signals import stopping
    from gossamer.cli.stores import open_store
    from gossamer.jobs.backlog import Backlog
    from gossamer.training.worker import Worker

    configure_logging(settings.log_level)
    if settings.threads is not None:
        import torch

        torch.set_num_threads(settings.threads)
    data_dir = settings.data_dir.expanduser().resolve()
    with base_stages(output) as progress:
        base = open_base(settings.base, data_dir, progress=progress)
    name = f"{socket.gethostname()[:100]}-{os.getpid()}"
    with open_store(settings, base) as store, stopping() as stop:
        if parent is not None:
            watch = threading.Thread(target=_end_with, args=(parent, stop), daemon=True)
            watch.start()
        backlog = Backlog(store.registry, limits=settings.limits.of_jobs())
        made = Worker(store, base, backlog, data_dir / WORK, name=name, lease_s=lease_s)
        document = {
            "event": "working",
            "worker": name,
            "base": settings.base,
            "data_dir": str(data_dir),
            "pid": os.getpid(),
        }
        output.result(document, f"Worker {name} takes jobs for {base.name} from {data_dir}.")
        taken = made.run(stop, once=once)
    output.result({"event": "ended", "jobs": taken}, f"It has taken {taken} jobs.")


def _end_with(parent: int, stop: threading.Event) -> None:
    """Stop when the process that started this one is gone, however it went: nobody else would."""
    while not stop.wait(_PARENT_S):
        if os.getppid() != parent:
            log.warning("the process %d that started this worker is gone", parent)
            stop.set()
