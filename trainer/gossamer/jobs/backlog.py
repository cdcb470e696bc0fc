"""The one door to the queue of training jobs.

    tenants  submit, get, list, events, checkpoints; cancel, pause, resume
    workers  claim → heartbeat, event, checkpointing … → finishing, fail, cancelled, paused, release

Everything here blocks for a short transaction and may be called from any thread of any process.
`tenant` is taken as true, and a job of another tenant is denied in the words of a missing one.

A worker's right to a job is its claim (`claiming` says how leases and fences work). Whatever a
worker writes checks the claim's fence in its own transaction, and a success is written in the
transaction that registers the version: a worker that was stopped past its lease changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from gossamer.jobs import claiming, log, reading, working
from gossamer.jobs.parts import Parts
from gossamer.jobs.requests import JobRequest
from gossamer.jobs.steering import steer
from gossamer.jobs.submitting import submit
from gossamer.jobs.views import (
    Checkpoint,
    Claim,
    Event,
    Job,
    JobError,
    JobLimits,
    Level,
    Order,
    Progress,
)
from gossamer.store.catalog.views import Direction, FileInfo, Page, VersionInfo
from gossamer.store.clock import utc_now
from gossamer.store.registry.database import Registry


class Backlog:
    """Jobs, by tenant and id.

    Args:
        registry: migrated; the backlog does not close it.
        clock: the time now, in UTC; every process of a registry must have the same.
        limits: quotas, attempts and bounds.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        clock: Callable[[], datetime] = utc_now,
        limits: JobLimits | None = None,
    ) -> None:
        self._parts = Parts(registry, clock, limits or JobLimits())

    # ---- tenants

    def submit(self, tenant: str, request: JobRequest) -> Job:
        """Put a job into the queue; durable when this returns.

        Idempotent for a while, for clients retry by themselves: an equal request of the tenant
        within `JobLimits.same_request_s` is the same job, unless that was cancelled.

        Raises:
            UnusableFile: a file is missing, another tenant's, or not for fine-tuning.
            TooManyJobs: the tenant has as many unfinished jobs as it may have.
            TenantNotFound, RegistryBusy, StoreFull
        """
        return submit(self._parts, tenant, request)

    def get(self, tenant: str, job_id: str) -> Job:
        """One job.

        Raises:
            JobNotFound
        """
        with self._parts.registry.read() as session:
            return reading.job_view(session, reading.find_row(session, tenant, job_id))

    def list(
        self,
        tenant: str,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
    ) -> Page[Job]:
        """A tenant's jobs, the newest first.

        Args:
            after: the id of the last job of the page before.
            limit: the most jobs of this page, from 1.
            metadata: those only that have all of these pairs.
            without_metadata: those only that have none.

        Raises:
            UnknownCursor: `after` is no job of the tenant.
        """
        with self._parts.registry.read() as session:
            return reading.read_jobs(
                session, tenant, after, limit, metadata or {}, without_metadata
            )

    def count(self) -> Mapping[str, int]:
        """How many jobs there are in each state, of all tenants. Reads the index of states only:
        10 ms for 100 000 jobs.

        Raises:
            RegistryBusy
        """
        with self._parts.registry.read() as session:
            return reading.count_jobs(session)

    def events(
        self,
        tenant: str,
        job_id: str,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Direction = "desc",
    ) -> Page[Event]:
        """A job's events, the newest first, or the oldest first to follow them: `after` the last
        one seen come those that are new.

        Raises:
            JobNotFound
            UnknownCursor: `after` is no event of the job; one that was thinned is good.
        """
        with self._parts.registry.read() as session:
            row = reading.find_row(session, tenant, job_id)
            return log.read_events(session, row, after, limit, order)

    def checkpoints(
        self,
        tenant: str,
        job_id: str,
        *,
        after: str | None = None,
        limit: int = 10,
        order: Direction = "desc",
    ) -> Page[Checkpoint]:
        """A job's checkpoints that can be asked at the moment, by their steps, the last first
        unless `order` is `asc`.

        Raises:
            JobNotFound
            UnknownCursor: `after` is no checkpoint of the job; one that was deleted is good.
        """
        with self._parts.registry.read() as session:
            row = reading.find_row(session, tenant, job_id)
            return reading.read_checkpoints(session, row, after, limit, order)

    def cancel(self, tenant: str, job_id: str) -> Job:
        """End a job: at once if no worker has it, else when its worker has heard of it (`wanted` is
        `cancel` until then). Once this returns the job cannot succeed, and it cannot be taken back.

        Raises:
            JobNotFound, RegistryBusy
            JobStateError: it has succeeded or failed.
        """
        return steer(self._parts, tenant, job_id, "cancel")

    def pause(self, tenant: str, job_id: str) -> Job:
        """Put a job aside, at once or when its worker has heard of it. It counts as unfinished.

        Raises:
            JobNotFound, RegistryBusy
            JobStateError: it is finished, or about to be cancelled.
        """
        return steer(self._parts, tenant, job_id, "pause")

    def resume(self, tenant: str, job_id: str) -> Job:
        """Put a paused job back into the queue, or take back a pause that is not carried out yet.

        Raises:
            JobNotFound, RegistryBusy
            JobStateError: it is finished, or about to be cancelled.
        """
        return steer(self._parts, tenant, job_id, "resume")

    # ---- workers

    def claim(
        self, worker: str, lease_s: float, *, base_fingerprint: str | None = None
    ) -> Claim | None:
        """Take a job from the queue, or from a worker whose lease has ended; None if there is none.

        It is the tenant's turn that has the fewest jobs running, and among these the one whose last
        turn is longest ago; of its jobs the oldest comes first. A job over which
        `JobLimits.max_attempts` workers died fails instead.

        Args:
            worker: who asks, for the log; at most 128 characters.
            lease_s: seconds until others may take the job, unless a heartbeat comes before.
            base_fingerprint: of the worker's base: jobs for another one are left alone.

        Raises:
            RegistryBusy
        """
        return claiming.claim(self._parts, worker, lease_s, base_fingerprint)

    def heartbeat(self, claim: Claim, lease_s: float, progress: Progress | None = None) -> Order:
        """Extend the lease to `lease_s` seconds from now, and report progress.

        Returns what the tenant wants: `continue`, or `cancel` or `pause`, to be answered by
        `cancelled` or `paused` soon.

        Raises:
            LeaseLost, RegistryBusy
        """
        return working.heartbeat(self._parts, claim, lease_s, progress)

    def wanted(self, claim: Claim) -> Order:
        """What the tenant wants, as `heartbeat` answers, but writes nothing: other writers do not
        wait for it.

        Raises:
            LeaseLost, RegistryBusy
        """
        with self._parts.registry.read() as session:
            return working.wanted(session, claim)

    def ended(self, job_ids: Collection[str]) -> frozenset[str]:
        """Those of the ids that no unfinished job has: their jobs are finished, or there are none.
        What is no id of a job is not among them.

        Raises:
            RegistryBusy
        """
        with self._parts.registry.read() as session:
            return reading.read_ended(session, job_ids)

    def event(
        self,
        claim: Claim,
        level: Level,
        message: str,
        data: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
    ) -> bool:
        """Write a line of the job's log; whether it was written.

        Args:
            message: at most 2 000 characters are kept.
            data: JSON values; makes metrics of the event. Its `step` says of which step.
            key: at most 64 characters: an event whose key the job's log has already is not written
                again. Of metrics it is `step-<n>` when none is given.

        Raises:
            LeaseLost, RegistryBusy
        """
        return working.event(self._parts, claim, level, message, data, key)

    def checkpointing(
        self, claim: Claim, step: int, metrics: Mapping[str, Any]
    ) -> Callable[[Session, VersionInfo], None]:
        """What makes an upload with `tag="step-<step>"` the job's checkpoint, in one transaction:
        `catalog.upload(…, also=backlog.checkpointing(…))`. The same step again replaces it.

        The upload then raises LeaseLost if the job is no longer the claim's.
        """
        return working.checkpointing(self._parts, claim, step, metrics)

    def outdated(self, claim: Claim, step: int) -> Callable[[Session], Collection[str]]:
        """What makes a checkpoint take the place of older ones, in one transaction:
        `catalog.upload(…, outdated=backlog.outdated(claim, step))`. The last
        `JobLimits.checkpoints` of the job stay, and those that an unfinished job of the tenant
        refers to.

        The upload then raises LeaseLost if the job is no longer the claim's.
        """
        return working.outdated(self._parts, claim, step)

    def attaching(self, claim: Claim) -> Callable[[Session, FileInfo], None]:
        """What makes an uploaded file one of the job's result files, in one transaction:
        `files.upload(…, "fine-tune-results", …, also=backlog.attaching(claim))`. A file of the same
        name, from an attempt before, is deleted.

        The upload then raises LeaseLost if the job is no longer the claim's.
        """
        return working.attaching(self._parts, claim)

    def finishing(
        self, claim: Claim, *, trained_tokens: int | None = None
    ) -> Callable[[Session, VersionInfo], None]:
        """What makes an upload the job's result, in one transaction, and the only way to succeed:
        `catalog.upload(tenant, job.adapter, …, also=backlog.finishing(claim))`.

        The upload then raises LeaseLost if the job is no longer the claim's, and CancelRequested if
        its tenant has cancelled it; either way there is no version.
        """
        return working.finishing(self._parts, claim, trained_tokens)

    def fail(self, claim: Claim, error: JobError) -> None:
        """End the job as failed, for a reason that another attempt would meet again.

        Raises:
            LeaseLost, RegistryBusy
        """
        working.fail(self._parts, claim, error)

    def cancelled(self, claim: Claim) -> None:
        """Answer to `cancel`: the job is cancelled.

        Raises:
            LeaseLost, RegistryBusy
        """
        working.cancelled(self._parts, claim)

    def paused(self, claim: Claim) -> None:
        """Answer to `pause`, after a checkpoint: the job is put aside. What its tenant has said
        meanwhile counts: it may be cancelled, or in the queue again.

        Raises:
            LeaseLost, RegistryBusy
        """
        working.give_back(self._parts, claim, keep_turn=False)

    def release(self, claim: Claim) -> None:
        """Give the job back, because this worker stops: it goes into the queue, or where its tenant
        wants it, and the attempt does not count.

        Raises:
            LeaseLost, RegistryBusy
        """
        working.give_back(self._parts, claim, keep_turn=True)
