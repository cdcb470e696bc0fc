"""Reading jobs: from ids to rows, and from rows to what callers see."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gossamer.jobs.errors import JobNotFound, UnknownCursor
from gossamer.jobs.requests import request_view
from gossamer.jobs.views import Checkpoint, Job, JobError, Order, Status
from gossamer.store.catalog.views import Direction, Page
from gossamer.store.registry.job_models import (
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    JobCheckpoint,
    JobMetadata,
)
from gossamer.store.registry.job_models import Job as Row
from gossamer.store.registry.models import ACTIVE, TOMBSTONED, Adapter, Tenant, Version

_JOB_ID = re.compile(r"ftjob-[0-9a-f]{24}")
_CHECKPOINT_ID = re.compile(r"ftckpt-[0-9a-f]{24}")
_UNFINISHED = sa.select(Row.public_id).where(Row.status.in_((QUEUED, RUNNING, PAUSED)))


def find_row(session: Session, tenant: str, job_id: str, *, lock: bool = False) -> Row:
    """A tenant's job.

    Raises:
        JobNotFound: there is none of that id, or it is another tenant's.
    """
    row = None
    if _JOB_ID.fullmatch(job_id):  # a database does not take every text
        query = (
            sa.select(Row)
            .join(Tenant, Tenant.id == Row.tenant_id)
            .where(Row.public_id == job_id, Tenant.name == tenant)
        )
        row = session.execute(query.with_for_update(of=Row) if lock else query).scalar_one_or_none()
    if row is None:
        raise JobNotFound(job_id)
    return row


def job_view(session: Session, row: Row) -> Job:
    """A row as a value."""
    return _view(row, session.get_one(Tenant, row.tenant_id).name)


def read_jobs(
    session: Session,
    tenant: str,
    after: str | None,
    limit: int,
    metadata: Mapping[str, str],
    without_metadata: bool,
) -> Page[Job]:
    """See `backlog.Backlog.list`."""
    query = sa.select(Row).join(Tenant, Tenant.id == Row.tenant_id).where(Tenant.name == tenant)
    if after is not None:
        try:
            query = query.where(Row.id < find_row(session, tenant, after).id)
        except JobNotFound as error:
            raise UnknownCursor(after) from error
    pairs = sa.exists().where(JobMetadata.job_id == Row.id)
    for key, value in metadata.items():
        query = query.where(pairs.where(JobMetadata.key == key, JobMetadata.value == value))
    if without_metadata:
        query = query.where(~pairs)
    found = session.execute(query.order_by(Row.id.desc()).limit(limit + 1)).scalars().all()
    return Page(tuple(_view(row, tenant) for row in found[:limit]), len(found) > limit)


def read_checkpoints(
    session: Session, row: Row, after: str | None, limit: int, order: Direction
) -> Page[Checkpoint]:
    """See `backlog.Backlog.checkpoints`."""
    mine = sa.select(JobCheckpoint).where(JobCheckpoint.job_id == row.id)
    query = mine.where(_its_version(row).where(Version.status == ACTIVE).exists())
    newest_first = order == "desc"
    step = JobCheckpoint.step
    if after is not None:
        cursor = None
        if _CHECKPOINT_ID.fullmatch(after):  # its version may be gone by now
            cursor = session.execute(
                mine.where(JobCheckpoint.public_id == after)
            ).scalar_one_or_none()
        if cursor is None:
            raise UnknownCursor(after)
        query = query.where(step < cursor.step if newest_first else step > cursor.step)
    query = query.order_by(step.desc() if newest_first else step).limit(limit + 1)
    found = session.execute(query).scalars().all()
    return Page(tuple(_checkpoint(c, row) for c in found[:limit]), len(found) > limit)


def kept_checkpoints(session: Session, row: Row) -> list[JobCheckpoint]:
    """Those of a job that take room, the last first; a damaged one does, too."""
    query = sa.select(JobCheckpoint).where(
        JobCheckpoint.job_id == row.id,
        _its_version(row).where(Version.status != TOMBSTONED).exists(),
    )
    return list(session.execute(query.order_by(JobCheckpoint.step.desc())).scalars())


def _its_version(row: Row) -> sa.Select[int]:
    """What a checkpoint of the job was registered as. Another job that makes the same name may have
    put its own in that place since, which says something else."""
    return (
        sa.select(Version.id)
        .join(Adapter, Adapter.id == Version.adapter_id)
        .where(Adapter.tenant_id == row.tenant_id, Adapter.name == row.adapter)
        .where(
            Version.tag == sa.literal("step-").concat(sa.cast(JobCheckpoint.step, sa.String)),
            Version.digest == JobCheckpoint.digest,
        )
        .correlate(JobCheckpoint)
    )


def referred_digests(session: Session, tenant: int) -> frozenset[str]:
    """Of the versions that a tenant's unfinished jobs begin with."""
    requests = session.execute(
        _UNFINISHED.with_only_columns(Row.request).where(Row.tenant_id == tenant)
    )
    return frozenset(
        fixed.rpartition("@")[2]
        for request in requests.scalars()
        for fixed in request_view(request).references.values()
    )


def outdated_tags(
    session: Session, tenant: int, checkpoints: Sequence[tuple[str, str]], keep: int
) -> tuple[str, ...]:
    """Which checkpoints of one training go when another one comes, so that `keep` stay: the oldest,
    but none that an unfinished job of the tenant begins with.

    Args:
        checkpoints: their tags and digests, the newest first.
    """
    gone = checkpoints[keep - 1 :]
    referred = referred_digests(session, tenant) if gone else frozenset()
    return tuple(tag for tag, digest in gone if digest not in referred)


def read_ended(session: Session, job_ids: Collection[str]) -> frozenset[str]:
    """See `backlog.Backlog.ended`."""
    # Which are not is asked of all jobs at once: those are few, and found by the index of states.
    unfinished = set(session.execute(_UNFINISHED).scalars())
    return frozenset(i for i in job_ids if _JOB_ID.fullmatch(i) and i not in unfinished)


def _checkpoint(found: JobCheckpoint, row: Row) -> Checkpoint:
    return Checkpoint(
        id=found.public_id,
        job_id=row.public_id,
        step=found.step,
        model=found.model,
        digest=found.digest,
        metrics=found.metrics,
        created_at=found.created_at,
    )


def _view(row: Row, tenant: str) -> Job:
    return Job(
        id=row.public_id,
        tenant=tenant,
        status=cast(Status, row.status),
        wanted=cast(Order | None, row.wanted),
        request=request_view(row.request),
        seed=row.seed,
        adapter=row.adapter,
        base_fingerprint=row.base_fingerprint,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        estimated_finish=row.estimated_finish,
        attempt=row.attempt,
        step=row.step,
        steps=row.steps,
        loss=row.loss,
        trained_tokens=row.trained_tokens,
        error=None if row.error is None else JobError(**row.error),
        fine_tuned_model=row.adapter if row.status == SUCCEEDED else None,
        version=row.version_label,
        digest=row.version_digest,
        result_files=tuple(row.result_files),
    )


def count_jobs(session: Session) -> dict[str, int]:
    """State → number of jobs."""
    query = sa.select(Row.status, sa.func.count().label("number")).group_by(Row.status)
    return {row.status: row.number for row in session.execute(query)}
