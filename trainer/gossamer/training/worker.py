"""The worker: takes jobs from the queue, trains, and hands in what comes out.

One job at a time. A thread of its own sends the heartbeats, looks every second what the tenant
wants, and ends the training when the lease is lost. Whatever the worker writes is fenced by its
claim, and the result becomes visible in the transaction that ends the job, so a worker that was
stopped past its lease changes nothing, however late it wakes up.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gossamer.base.load import BaseFiles
from gossamer.jobs.backlog import Backlog
from gossamer.jobs.errors import CancelRequested, LeaseLost
from gossamer.jobs.lease import Lease
from gossamer.jobs.views import Order
from gossamer.store.catalog.errors import RegistryBusy, StoreFull
from gossamer.store.catalog.opening import Store
from gossamer.training.attempt import Attempt
from gossamer.training.errors import StoppedError
from gossamer.training.failures import job_error
from gossamer.training.loading import LoadedBase, free_memory

log = logging.getLogger(__name__)

#: Seconds between two looks into an empty queue.
POLL_S = 1.0
#: Seconds until others may take a job whose worker is silent.
LEASE_S = 30.0
#: Seconds between two looks, between heartbeats, at what the tenant wants.
LOOK_S = 1.0
#: Seconds between two looks for what finished jobs have left in the work folder, at least.
SWEEP_S = 60.0
#: What may be over at the next try: the registry cannot be written at the moment.
_NOT_NOW = (RegistryBusy, StoreFull)


class Worker:
    """Serves the queue of one registry, for one base.

    Args:
        store: of the data folder; not its owner.
        base: the base model; loaded with the first job and kept, as `LoadedBase` says.
        backlog: on the store's registry.
        work_dir: where unfinished jobs keep what they need to go on; workers that share it take
            over each other's jobs where those were, others from the beginning.
        name: of this worker, for logs.
        lease_s: how long it may be silent.
    """

    def __init__(
        self,
        store: Store,
        base: BaseFiles,
        backlog: Backlog,
        work_dir: Path,
        *,
        name: str,
        lease_s: float = LEASE_S,
    ) -> None:
        self._store = store
        self._loaded = LoadedBase(base)
        self._backlog = backlog
        self._work_dir = work_dir
        self._name = name
        self._trouble = ""  # why no job could be taken, for it to be said once
        self._swept: float | None = None  # when the work folder was looked through
        self._lease_s = lease_s

    def run(self, stop: threading.Event, *, once: bool = False) -> int:
        """Serve until `stop` is set, or with `once` until the queue is empty.

        Returns how many jobs were taken. A job under way when `stop` is set ends with a checkpoint
        and goes back into the queue.
        """
        taken = 0
        self._sweep()
        while not stop.is_set():
            lease = self._take()
            if lease is not None:
                taken += 1
                self._serve(lease, stop)
                free_memory()
                continue
            self._sweep()
            if once:
                break
            stop.wait(POLL_S)
        return taken

    def _sweep(self) -> None:
        """Remove what jobs have kept that ended without a worker: cancelled while they were paused,
        or given up after too many attempts. Does so now and then only.

        The folders are listed first and the registry is asked afterwards: a folder is made for a
        job that is there, and a job that is finished stays so. So no folder that somebody goes on
        from, or is about to make, is among those that go.
        """
        now = time.monotonic()
        if self._swept is not None and now - self._swept < SWEEP_S:
            return
        self._swept = now
        folders = {path.name: path for path in self._work_dir.glob("*") if path.is_dir()}
        if not folders:
            return
        try:
            ended = self._backlog.ended(folders)
        except _NOT_NOW as error:
            log.warning("the work folder is left as it is: %s", error)
            return
        for job in sorted(ended):
            log.info("job %s has ended: what it had kept is removed", job)
            shutil.rmtree(folders[job], ignore_errors=True)

    def _take(self) -> Lease | None:
        fingerprint = self._loaded.files.fingerprint
        try:
            lease = Lease.take(
                self._backlog, self._name, self._lease_s, base_fingerprint=fingerprint
            )
        except _NOT_NOW as error:
            if str(error) != self._trouble:
                log.warning("no job could be taken: %s", error)
            self._trouble = str(error)
            return None
        self._trouble = ""
        return lease

    def _serve(self, lease: Lease, stop: threading.Event) -> None:
        job = lease.claim.job
        log.info("job %s of %s: attempt %d", job.id, job.tenant, job.attempt)
        attempt = Attempt(
            self._store, self._loaded, self._backlog, lease.claim, self._work_dir, self._lease_s
        )
        with Pulse(lease, attempt) as pulse:
            try:
                attempt.run(lambda: stop.is_set() or pulse.order != "continue" or pulse.lost)
            except StoppedError:
                self._leave(lease, attempt, pulse)
            except CancelRequested:
                self._end(lease, attempt, "cancel")
            except LeaseLost:
                log.warning("job %s: the lease was lost; nothing was changed", job.id)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the job's failure
                self._fail(lease, attempt, error)
            # What is no Exception, as a second Ctrl-C, is this process's end and not the job's: it
            # is taken again when its lease has ended.

    def _leave(self, lease: Lease, attempt: Attempt, pulse: Pulse) -> None:
        """The training stopped after a step, with a checkpoint."""
        if pulse.lost:
            log.warning("job %s: the lease was lost; nothing was changed", lease.claim.job.id)
            return
        self._end(lease, attempt, pulse.order)

    def _end(self, lease: Lease, attempt: Attempt, order: Order) -> None:
        claim = lease.claim
        log.info("job %s: %s", claim.job.id, "released" if order == "continue" else order)

        def end() -> None:
            if order == "cancel":
                self._backlog.cancelled(claim)
                attempt.forget()
            elif order == "pause":
                self._backlog.paused(claim)
            else:
                self._backlog.release(claim)

        self._insist(lease, end)

    def _fail(self, lease: Lease, attempt: Attempt, error: Exception) -> None:
        claim, reason = lease.claim, job_error(error, attempt.given)
        log.warning("job %s failed: %s", claim.job.id, reason.message, exc_info=error)
        if reason.code == "disk_full":
            # What it has kept may be what fills the disk, the registry's too. Only that: nobody has
            # asked yet whether the job is still ours.
            attempt.abandon()

        def end() -> None:
            self._backlog.fail(claim, reason)
            attempt.forget()

        self._insist(lease, end)

    def _insist(self, lease: Lease, end: Callable[[], None]) -> None:
        """Try for as long as the lease lasts: others have the registry now and then, or a disk is
        full. After that the job is taken again, by whoever can."""
        while True:
            try:
                end()
                return
            except _NOT_NOW as error:
                if not lease.remaining_s:
                    log.warning(
                        "job %s: %s; left to the end of its lease", lease.claim.job.id, error
                    )
                    return
                time.sleep(min(POLL_S, lease.remaining_s))
            except LeaseLost:
                log.warning("job %s: the lease was lost; nothing was changed", lease.claim.job.id)
                return


class Pulse:
    """Sends a job's heartbeats, and looks between them, from a thread of its own, while the context
    lasts.

    Attributes:
        order: what the tenant wanted when it was last looked at.
        lost: whether the job may be another worker's by now.
    """

    def __init__(self, lease: Lease, attempt: Attempt) -> None:
        self.order: Order = "continue"
        self.lost = False
        self._lease = lease
        self._attempt = attempt
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        looked = time.monotonic()
        while not self._done.wait(0.2):
            if not self._lease.remaining_s:
                # Stopped for too long, or the registry was away: to beat now is to ask.
                self.lost = True
            try:
                if self._lease.is_due:
                    self.order = self._lease.beat(self._attempt.progress)
                    self.lost = False
                elif time.monotonic() - looked >= LOOK_S:
                    self.order = self._lease.look()
                else:
                    continue
            except LeaseLost:
                self.lost = True
                return
            except _NOT_NOW as error:
                log.warning("the registry did not answer: %s", error)
                self._done.wait(POLL_S)
            looked = time.monotonic()
