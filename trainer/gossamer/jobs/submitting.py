"""Submitting a job: one transaction, whatever a client repeats."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gossamer.jobs.errors import TooManyJobs, UnusableFile
from gossamer.jobs.log import write_event
from gossamer.jobs.parts import Parts
from gossamer.jobs.reading import job_view
from gossamer.jobs.requests import JobRequest
from gossamer.jobs.views import Job
from gossamer.store.catalog.errors import FileNotFound
from gossamer.store.files import COUNTED, find_file
from gossamer.store.registry.job_models import CANCELLED, FINISHED, QUEUED, JobMetadata
from gossamer.store.registry.job_models import Job as Row
from gossamer.store.registry.models import File
from gossamer.store.registry.tenants import lock_tenant

#: seeds are drawn below this: what most random generators take
_SEEDS = 1 << 31


def submit(parts: Parts, tenant: str, request: JobRequest) -> Job:
    """Put a job into the queue. See `backlog.Backlog.submit`."""
    digest = request.digest()
    with parts.registry.write() as session:
        owner = lock_tenant(session, tenant)  # submissions of one tenant are one after another
        now = parts.clock()
        row = _find_same(session, owner.id, digest, now, parts.limits.same_request_s)
        if row is not None:
            return job_view(session, row)
        training = _find_file(session, tenant, "training_file", request.training_file)
        validation = None
        if request.validation_file is not None:
            validation = _find_file(session, tenant, "validation_file", request.validation_file)
        _check_quota(session, owner.id, parts.limits.unfinished)
        row = _new_row(request, digest, now)
        row.tenant_id, row.training_file_id = owner.id, training.id
        row.validation_file_id = None if validation is None else validation.id
        session.add(row)
        session.flush()
        session.add_all(
            JobMetadata(job_id=row.id, key=key, value=value)
            for key, value in (request.metadata or {}).items()
        )
        message = f"The job is queued, with the method {request.method}."
        write_event(session, row, now, message, keep=parts.limits.events)
        return job_view(session, row)


def _new_row(request: JobRequest, digest: str, now: datetime) -> Row:
    token = secrets.token_hex(12)
    return Row(
        public_id=f"ftjob-{token}",
        status=QUEUED,
        request=request.to_json(),
        request_digest=digest,
        seed=secrets.randbelow(_SEEDS) if request.seed is None else request.seed,
        adapter=request.suffix or f"ft-{token[:12]}",
        base_fingerprint=request.base_fingerprint,
        created_at=now,
        attempt=0,
        fence=0,
        last_event=0,
        kept_events=0,
        result_files=[],
    )


def _find_same(
    session: Session, tenant: int, digest: str, now: datetime, seconds: float
) -> Row | None:
    """The job that this request made already. Not a cancelled one: whoever cancelled it knew its
    id, so asking again is meant."""
    window = timedelta(seconds=seconds)
    query = sa.select(Row).where(
        Row.tenant_id == tenant,
        Row.request_digest == digest,
        Row.status != CANCELLED,
        Row.created_at.between(now - window, now + window),
    )
    return session.execute(query.order_by(Row.id.desc()).limit(1)).scalar_one_or_none()


def _find_file(session: Session, tenant: str, param: str, file_id: str) -> File:
    try:
        row = find_file(session, tenant, file_id)
    except FileNotFound as error:
        why = "does not exist or you do not have access to it"
        raise UnusableFile(param, file_id, why) from error
    if row.purpose != COUNTED:
        raise UnusableFile(param, file_id, f"was not uploaded with the purpose {COUNTED!r}")
    return row


def _check_quota(session: Session, tenant: int, limit: int) -> None:
    query = sa.select(sa.func.count()).where(Row.tenant_id == tenant, Row.status.not_in(FINISHED))
    if session.execute(query).scalar_one() >= limit:
        raise TooManyJobs(limit)
