"""A data folder with a tiny base, training files and a queue; and workers, here or in processes."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.base.fingerprint import fingerprint
from gossamer.base.load import BaseFiles, load_directory
from gossamer.base.patch_map import adapter_table
from gossamer.jobs.backlog import Backlog
from gossamer.jobs.requests import JobRequest
from gossamer.jobs.views import Job
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import BaseInfo
from gossamer.training.worker import Worker
from tests.training.support import counting_examples

TENANT = "acme"
#: A few steps at a rate that moves a tiny model.
SETTINGS: dict[str, Any] = {"batch_size": 8, "max_steps": 9, "learning_rate": 1e-2}


@contextmanager
def still_heap() -> Iterator[None]:
    """Garbage is collected after each job and at the start of each phase: 0.3 s with all that the
    training stack has imported, and 30 ms without."""
    import gossamer.training.run  # noqa: F401 - what it brings in is what is to be kept still

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def base_in(folder: Path) -> tuple[BaseFiles, BaseInfo]:
    """A base directory, as the trainer and as the store see it."""
    import torch

    model = load_directory(folder, torch.float32)
    name = fingerprint(model)
    return BaseFiles("tiny", folder, name), BaseInfo("tiny", name, adapter_table(model))


@dataclass(frozen=True)
class Plant:
    """What the tests work with: the server's side of a data folder."""

    data: Path
    base: BaseFiles
    info: BaseInfo
    store: Store
    backlog: Backlog

    def file(self, lines: Sequence[Any] | bytes, name: str = "data.jsonl") -> str:
        """Keep a training file; its id."""
        text = lines
        if not isinstance(text, bytes):
            text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        with self.store.files.spool() as spool:
            spool.write(text)
            return self.store.files.upload(TENANT, name, "fine-tune", spool).id

    def submit(
        self,
        method: str = "sparta",
        parameters: dict[str, Any] | None = None,
        *,
        file: str | None = None,
        settings: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Job:
        """Put a job into the queue."""
        request = JobRequest.of(
            method=method,
            parameters=parameters or {},
            settings={**SETTINGS, **(settings or {})},
            training_file=file or self.file(counting_examples()),
            base_fingerprint=self.base.fingerprint,
            **{"seed": 5, "suffix": "made", **fields},
        )
        return self.backlog.submit(TENANT, request)

    def get(self, job: Job) -> Job:
        """The job as it is now."""
        return self.backlog.get(TENANT, job.id)

    def messages(self, job: Job) -> list[str]:
        """What its log says, oldest first."""
        page = self.backlog.events(TENANT, job.id, limit=100_000, order="asc")
        return [event.message for event in page.items]

    def work(self, *, stop: threading.Event | None = None, lease_s: float = 30.0) -> int:
        """A worker in this process, until the queue is empty."""
        with Store(self.data, self.info) as store:
            worker = Worker(
                store, self.base, Backlog(store.registry), self.data / "work", name="here",
                lease_s=lease_s,
            )  # fmt: skip
            return worker.run(stop or threading.Event(), once=True)

    def process(self, lease_s: float = 2.0) -> subprocess.Popen[bytes]:
        """A worker in a process of its own, that serves until it is told to stop."""
        command = [sys.executable, "-m", "tests.worker.child", str(self.data),
                   str(self.base.path), str(lease_s)]  # fmt: skip
        return subprocess.Popen(command, cwd=Path(__file__).parents[2])

    def wait(self, job: Job, ready: Callable[[Job], bool], seconds: float = 60.0) -> Job:
        """Until the job is as wanted."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            now = self.get(job)
            if ready(now):
                return now
            time.sleep(0.02)
        raise TimeoutError(f"{self.get(job)}")


@contextmanager
def planted(data: Path, folder: Path) -> Iterator[Plant]:
    """An open data folder, owned as by a server."""
    base, info = base_in(folder)
    with Store(data, info, owner=True) as store:
        if TENANT not in store.catalog.tenants():
            store.catalog.create_tenant(TENANT)
        yield Plant(data, base, info, store, Backlog(store.registry))


def end(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM) -> int:
    """Tell a process to stop; its exit status."""
    process.send_signal(how)
    return process.wait(timeout=60)
