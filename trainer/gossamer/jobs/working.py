"""What a worker writes while it has a job. Every write checks the fence in its own transaction."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gossamer.jobs.errors import CancelRequested, LeaseLost
from gossamer.jobs.log import finite, write_event
from gossamer.jobs.parts import Parts
from gossamer.jobs.reading import kept_checkpoints, outdated_tags
from gossamer.jobs.steering import CANCEL, leave, settle
from gossamer.jobs.views import Claim, JobError, Level, Order, Progress
from gossamer.store.catalog.views import FileInfo, VersionInfo
from gossamer.store.registry.job_models import FAILED, RUNNING, SUCCEEDED, JobCheckpoint
from gossamer.store.registry.job_models import Job as Row
from gossamer.store.registry.models import File


def fenced(session: Session, claim: Claim) -> Row:
    """The claimed job's row, locked.

    Raises:
        LeaseLost
    """
    query = sa.select(Row).where(Row.public_id == claim.job.id).with_for_update()
    row = session.execute(query).scalar_one_or_none()
    if row is None or row.fence != claim.fence or row.status != RUNNING:
        raise LeaseLost(claim.job.id, claim.worker)
    return row


def wanted(session: Session, claim: Claim) -> Order:
    """What a claimed job's tenant wants; see `backlog.Backlog.wanted`."""
    query = sa.select(Row.status, Row.fence, Row.wanted).where(Row.public_id == claim.job.id)
    found = session.execute(query).first()
    if found is None or found.fence != claim.fence or found.status != RUNNING:
        raise LeaseLost(claim.job.id, claim.worker)
    return cast(Order, found.wanted or "continue")


def heartbeat(parts: Parts, claim: Claim, lease_s: float, progress: Progress | None) -> Order:
    """Extend the lease; see `backlog.Backlog.heartbeat`."""
    with parts.registry.write() as session:
        row, now = fenced(session, claim), parts.clock()
        row.heartbeat_at, row.lease_until = now, now + timedelta(seconds=lease_s)
        if progress is not None:
            row.step, row.steps = progress.step, progress.steps
            loss = progress.loss
            row.loss = loss if loss is not None and math.isfinite(loss) else None
            if progress.trained_tokens is not None:
                # An attempt repeats what the one before it had not kept.
                row.trained_tokens = max(row.trained_tokens or 0, progress.trained_tokens)
            remaining = progress.remaining_s
            row.estimated_finish = None if remaining is None else now + timedelta(seconds=remaining)
        return cast(Order, row.wanted or "continue")


def event(
    parts: Parts,
    claim: Claim,
    level: Level,
    message: str,
    data: Mapping[str, Any] | None,
    key: str | None,
) -> bool:
    """Write an event; see `backlog.Backlog.event`."""
    with parts.registry.write() as session:
        row = fenced(session, claim)
        return write_event(
            session,
            row,
            parts.clock(),
            message,
            keep=parts.limits.events,
            level=level,
            data=data,
            key=key,
        )


def fail(parts: Parts, claim: Claim, error: JobError) -> None:
    """End the job as failed; see `backlog.Backlog.fail`."""
    with parts.registry.write() as session:
        row, now = fenced(session, claim), parts.clock()
        row.error = {"code": error.code, "message": error.message, "param": error.param}
        leave(row, FAILED, now)
        message = f"The job failed: {error.message}"
        write_event(session, row, now, message, level="error", keep=parts.limits.events)


def give_back(parts: Parts, claim: Claim, *, keep_turn: bool) -> None:
    """End the claim by the worker's own leave: no attempt counts, and the job goes where its tenant
    wants it. `keep_turn`: whether the tenant is next in line as if it had not been its turn."""
    with parts.registry.write() as session:
        row = fenced(session, claim)
        row.attempt -= 1
        if keep_turn:
            row.claimed_at = None
        settle(parts, session, row, parts.clock())


def cancelled(parts: Parts, claim: Claim) -> None:
    """End the job as cancelled; see `backlog.Backlog.cancelled`."""
    with parts.registry.write() as session:
        row = fenced(session, claim)
        if row.wanted != CANCEL:
            raise RuntimeError(f"nobody wants the job {claim.job.id} cancelled")
        settle(parts, session, row, parts.clock())


def finishing(
    parts: Parts, claim: Claim, trained_tokens: int | None
) -> Callable[[Session, VersionInfo], None]:
    """See `backlog.Backlog.finishing`."""

    def also(session: Session, version: VersionInfo) -> None:
        row, now = fenced(session, claim), parts.clock()
        if row.wanted == CANCEL:
            raise CancelRequested(claim.job.id)
        if version.name != row.adapter or version.number is None:
            raise RuntimeError(f"{version.label} is not what the job {claim.job.id} makes")
        row.version_label, row.version_digest = version.label, version.digest
        row.trained_tokens = row.trained_tokens if trained_tokens is None else trained_tokens
        row.step = row.steps
        leave(row, SUCCEEDED, now)
        message = f"The job succeeded: {version.label}."
        write_event(session, row, now, message, keep=parts.limits.events)

    return also


def checkpointing(
    parts: Parts, claim: Claim, step: int, metrics: Mapping[str, Any]
) -> Callable[[Session, VersionInfo], None]:
    """See `backlog.Backlog.checkpointing`."""

    def also(session: Session, version: VersionInfo) -> None:
        row, now = fenced(session, claim), parts.clock()
        if version.name != row.adapter or version.tag != f"step-{step}":
            raise RuntimeError(f"{version.label} is no checkpoint {step} of {claim.job.id}")
        query = sa.select(JobCheckpoint).where(
            JobCheckpoint.job_id == row.id, JobCheckpoint.step == step
        )
        found = session.execute(query).scalar_one_or_none()
        if found is None:
            found = JobCheckpoint(
                public_id=f"ftckpt-{secrets.token_hex(12)}", job_id=row.id, step=step
            )
            session.add(found)
        found.model, found.digest = version.label, version.digest
        found.metrics, found.created_at = finite(metrics), now
        message = f"A checkpoint can be tried: {version.label}."
        write_event(session, row, now, message, keep=parts.limits.events, key=f"checkpoint-{step}")

    return also


def outdated(parts: Parts, claim: Claim, step: int) -> Callable[[Session], tuple[str, ...]]:
    """See `backlog.Backlog.outdated`."""

    def tags(session: Session) -> tuple[str, ...]:
        row = fenced(session, claim)
        kept = kept_checkpoints(session, row)
        others = [(f"step-{one.step}", one.digest) for one in kept if one.step != step]
        return outdated_tags(session, row.tenant_id, others, parts.limits.checkpoints)

    return tags


def attaching(parts: Parts, claim: Claim) -> Callable[[Session, FileInfo], None]:
    """See `backlog.Backlog.attaching`."""

    def also(session: Session, file: FileInfo) -> None:
        row, now = fenced(session, claim), parts.clock()
        older = sa.and_(File.public_id.in_(row.result_files), File.filename == file.filename)
        replaced = session.execute(sa.select(File).where(older)).scalars().all()
        for former in replaced:  # an attempt before this one wrote it, and died before its end
            former.deleted_at = now
        gone = {former.public_id for former in replaced}
        row.result_files = [f for f in row.result_files if f not in gone] + [file.id]

    return also
