"""A tenant's word about its job: cancel, pause, resume; and what it makes of the job's state.

    queued  → paused, cancelled                 at once
    running → wanted: pause, wanted: cancel     the worker hears it within a second
    paused  → queued, cancelled                 at once

Asking again for what is so already changes nothing, for clients retry by themselves. A cancel
cannot be taken back, and once it is acknowledged the job cannot succeed.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from sqlalchemy.orm import Session

from gossamer.jobs.errors import JobStateError
from gossamer.jobs.log import write_event
from gossamer.jobs.parts import Parts
from gossamer.jobs.reading import find_row, job_view
from gossamer.jobs.views import Job
from gossamer.store.registry.job_models import CANCELLED, FINISHED, PAUSED, QUEUED, RUNNING
from gossamer.store.registry.job_models import Job as Row

Action = Literal["cancel", "pause", "resume"]
CANCEL: Action = "cancel"
PAUSE: Action = "pause"


def steer(parts: Parts, tenant: str, job_id: str, action: Action) -> Job:
    """Do what `backlog.Backlog` promises of the action."""
    with parts.registry.write() as session:
        row, now = find_row(session, tenant, job_id, lock=True), parts.clock()
        _check(row, action)
        if _is_so(row, action):
            return job_view(session, row)
        if action == "resume":
            _resume(parts, session, row, now)
        elif row.status == RUNNING and row.lease_until is not None and row.lease_until > now:
            _ask_worker(parts, session, row, now, action)
        else:
            row.wanted = action
            settle(parts, session, row, now)
        session.flush()
        return job_view(session, row)


def settle(parts: Parts, session: Session, row: Row, now: datetime) -> None:
    """Put a job that nobody works on, or nobody any longer, where it is wanted: it is cancelled,
    paused, or in the queue. Its worker, if there was one, has lost it."""
    status = QUEUED
    if row.wanted is not None:
        status = CANCELLED if row.wanted == CANCEL else PAUSED
    leave(row, status, now)
    write_event(session, row, now, f"The job is {status}.", keep=parts.limits.events)


def leave(row: Row, status: str, now: datetime) -> None:
    """Take the job from its worker."""
    row.status = status
    row.worker = row.wanted = None
    row.heartbeat_at = row.lease_until = row.estimated_finish = None
    if status in FINISHED:
        row.finished_at = now


def _is_so(row: Row, action: Action) -> bool:
    if action == "resume":
        return row.wanted is None and row.status in (QUEUED, RUNNING)
    return row.status == (CANCELLED if action == CANCEL else PAUSED)


def _check(row: Row, action: Action) -> None:
    if action == CANCEL and row.status == CANCELLED:
        return
    if row.status in FINISHED:
        raise JobStateError(row.public_id, action, row.status)
    if action != CANCEL and row.wanted == CANCEL:
        raise JobStateError(row.public_id, action, "cancelling")


def _ask_worker(parts: Parts, session: Session, row: Row, now: datetime, action: Action) -> None:
    if row.wanted != action:
        row.wanted = action
        write_event(
            session, row, now, f"The worker is asked to {action} the job.", keep=parts.limits.events
        )


def _resume(parts: Parts, session: Session, row: Row, now: datetime) -> None:
    if row.status == PAUSED:
        settle(parts, session, row, now)
    else:
        row.wanted = None
        write_event(session, row, now, "The job goes on without a pause.", keep=parts.limits.events)
