"""Claims: which job a worker gets, and what becomes of the jobs of workers that died.

A claim has a lease, which heartbeats extend, and a fence, which each claim of a job raises. The
lease decides when a job may be given to somebody else; the fence decides who may write to it. So a
clock can cost time, never a result:

The times are those of one clock, the host's wall clock that the backlog is given. SQLite has no
other, and the hosts of workers on PostgreSQL are off by milliseconds where a lease has tens of
seconds. If it jumps ahead, leases end early: a live worker whose job is taken finds itself fenced
and stops. If it jumps back, leases granted in what is the future now would last for as long as the
jump: they are dated anew by the first one who looks. A worker judges its own lease by a monotonic
clock (`lease.Lease`).
"""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased

from gossamer.jobs.log import write_event
from gossamer.jobs.parts import Parts
from gossamer.jobs.reading import job_view
from gossamer.jobs.steering import leave, settle
from gossamer.jobs.views import Claim
from gossamer.store.registry.job_models import FAILED, QUEUED, RUNNING
from gossamer.store.registry.job_models import Job as Row

#: what two hosts' clocks may differ by before a lease counts as granted in the future
SKEW = timedelta(seconds=5)


def claim(parts: Parts, worker: str, lease_s: float, base: str | None) -> Claim | None:
    """Take the job whose turn it is. See `backlog.Backlog.claim`."""
    with parts.registry.read() as session:
        # Most polls find nothing, and then no other writer has to wait.
        if not _is_anything_to_do(session, parts.clock(), base):
            return None
    with parts.registry.write() as session:
        now = parts.clock()
        _date_anew(session, now)
        _bury(parts, session, now)
        row = session.execute(next_query(now, base)).scalar_one_or_none()
        if row is None:
            return None
        row.status, row.worker = RUNNING, worker
        row.attempt += 1
        row.fence += 1
        row.claimed_at = row.heartbeat_at = now
        row.lease_until = now + timedelta(seconds=lease_s)
        row.started_at = row.started_at or now
        again = f", attempt {row.attempt}" if row.attempt > 1 else ""
        write_event(session, row, now, f"A worker begins{again}.", keep=parts.limits.events)
        return Claim(job_view(session, row), worker, row.fence)


def _is_anything_to_do(session: Session, now: datetime, base: str | None) -> bool:
    ours = _claimable(now) if base is None else _claimable(now) & (Row.base_fingerprint == base)
    others = sa.and_(Row.status == RUNNING, sa.or_(Row.lease_until <= now, _from_the_future(now)))
    return session.execute(sa.select(Row.id).where(ours | others).limit(1)).first() is not None


def _claimable(now: datetime) -> sa.ColumnElement[bool]:
    """Queued; or running with a lease that has ended, and nothing else wanted of it."""
    orphaned = sa.and_(Row.status == RUNNING, Row.lease_until <= now, Row.wanted.is_(None))
    return sa.or_(Row.status == QUEUED, orphaned)


def _from_the_future(now: datetime) -> sa.ColumnElement[bool]:
    return Row.heartbeat_at > now + SKEW


def _date_anew(session: Session, now: datetime) -> None:
    """Let leases from before the clock was set back end as long after now as they were granted."""
    query = sa.select(Row).where(Row.status == RUNNING, _from_the_future(now))
    for row in session.execute(query.with_for_update(skip_locked=True)).scalars():
        if row.lease_until is not None and row.heartbeat_at is not None:
            row.lease_until = now + (row.lease_until - row.heartbeat_at)
            row.heartbeat_at = now
    session.flush()


def _bury(parts: Parts, session: Session, now: datetime) -> None:
    """End what dead workers cannot: jobs to be cancelled or paused, and jobs that kill workers."""
    most = parts.limits.max_attempts
    query = sa.select(Row).where(
        Row.status == RUNNING,
        Row.lease_until <= now,
        sa.or_(Row.wanted.is_not(None), Row.attempt >= most),
    )
    for row in session.execute(query.with_for_update(skip_locked=True)).scalars():
        if row.wanted is not None:
            settle(parts, session, row, now)
            continue
        message = f"{row.attempt} workers in a row died, or lost their lease, over this job."
        row.error = {"code": "worker_lost", "message": message, "param": None}
        leave(row, FAILED, now)
        write_event(
            session, row, now, f"The job failed: {message}", level="error", keep=parts.limits.events
        )
    session.flush()


def next_query(now: datetime, base: str | None) -> sa.Select[Row]:
    """The claimable job whose turn it is, locked: of the tenant with the fewest jobs running; then
    of the one whose last turn is longest ago, or that had none; then the oldest. On PostgreSQL it
    passes over those that another worker is taking; on SQLite there is one writer at a time."""
    other = aliased(Row)
    same_tenant = other.tenant_id == Row.tenant_id
    running = (
        sa.select(sa.func.count())
        .select_from(other)
        .where(same_tenant, other.status == RUNNING, other.lease_until > now)
        .correlate(Row)
        .scalar_subquery()
    )
    last_turn = (
        sa.select(sa.func.max(other.claimed_at)).where(same_tenant).correlate(Row).scalar_subquery()
    )
    query = sa.select(Row).where(_claimable(now))
    if base is not None:
        query = query.where(Row.base_fingerprint == base)
    query = query.order_by(running, last_turn.nulls_first(), Row.id).limit(1)
    return query.with_for_update(skip_locked=True)
