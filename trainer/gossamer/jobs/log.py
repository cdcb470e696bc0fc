"""A job's events: numbered, written once, and bounded.

An event with a key that the job has already is the same event, and is not written again: a resumed
attempt repeats the steps since its checkpoint, and their metrics with them. When a job has as many
events as it may, every other one of the older half of its metrics goes, so that a curve over the
whole run is left; messages go only where there are no metrics to thin.

The caller has the job's row locked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gossamer.jobs.errors import UnknownCursor
from gossamer.jobs.views import Event, EventKind, Level
from gossamer.store.catalog.views import Direction, Page
from gossamer.store.registry.job_models import Job as Row
from gossamer.store.registry.job_models import JobEvent

MAX_MESSAGE = 2000
_MESSAGE: EventKind = "message"
_METRICS: EventKind = "metrics"
_EVENT_ID = re.compile(r"ftevent-([0-9a-f]{24})([0-9a-f]{8})")


def write_event(
    session: Session,
    row: Row,
    now: datetime,
    message: str,
    *,
    keep: int,
    level: Level = "info",
    data: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> bool:
    """Add an event, unless the job has it; whether it was added.

    Args:
        keep: the most events that the job may have.
        data: makes metrics of the event; its whole number `step` says of which step, and is the
            key where none is given.
    """
    step = None if data is None else data.get("step")
    step = step if isinstance(step, int) and not isinstance(step, bool) else None
    key = f"step-{step}" if key is None and step is not None else key
    if _is_known(session, row, key, step):
        return False
    if row.kept_events >= keep:
        _thin(session, row)
    row.last_event += 1
    row.kept_events += 1
    session.add(
        JobEvent(
            job_id=row.id,
            number=row.last_event,
            key=key,
            created_at=now,
            level=level,
            kind=_MESSAGE if data is None else _METRICS,
            message=message[:MAX_MESSAGE].replace("\0", "�"),
            step=step,
            data=None if data is None else finite(data),
        )
    )
    session.flush()
    return True


def read_events(
    session: Session, row: Row, after: str | None, limit: int, order: Direction
) -> Page[Event]:
    """See `backlog.Backlog.events`."""
    query = sa.select(JobEvent).where(JobEvent.job_id == row.id)
    newest_first = order == "desc"
    number = JobEvent.number
    if after is not None:
        cursor = _number(row, after)
        query = query.where(number < cursor if newest_first else number > cursor)
    query = query.order_by(number.desc() if newest_first else number).limit(limit + 1)
    found = session.execute(query).scalars().all()
    return Page(tuple(_event(e, row) for e in found[:limit]), len(found) > limit)


def finite(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data with `None` for numbers that JSON has no way to write: NaN and the infinities."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()
    }


def _is_known(session: Session, row: Row, key: str | None, step: int | None) -> bool:
    if step is not None and row.thinned_step is not None and step <= row.thinned_step:
        return True  # it may be one of those that went
    if key is None:
        return False
    query = sa.select(JobEvent.number).where(JobEvent.job_id == row.id, JobEvent.key == key)
    return session.execute(query.limit(1)).first() is not None


def _thin(session: Session, row: Row) -> None:
    mine = sa.select(JobEvent.number, JobEvent.step).where(JobEvent.job_id == row.id)
    metrics = session.execute(mine.where(JobEvent.kind == _METRICS).order_by(JobEvent.number)).all()
    older = metrics[: len(metrics) // 2]
    doomed = [number for number, _ in older[1::2]]
    if doomed:
        steps = [step for _, step in older if step is not None]
        row.thinned_step = max([*steps, row.thinned_step or 0])
    else:
        oldest = session.execute(mine.order_by(JobEvent.number).limit(row.kept_events // 4 + 1))
        doomed = [number for number, _ in oldest]
    session.execute(
        sa.delete(JobEvent).where(JobEvent.job_id == row.id, JobEvent.number.in_(doomed))
    )
    row.kept_events -= len(doomed)


def _id(row: Row, number: int) -> str:
    """An event needs no id of its own in the table: the job's and its number are one."""
    return f"ftevent-{row.public_id.removeprefix('ftjob-')}{number:08x}"


def _number(row: Row, event_id: str) -> int:
    match = _EVENT_ID.fullmatch(event_id)
    if match is None or f"ftjob-{match[1]}" != row.public_id or int(match[2], 16) > row.last_event:
        raise UnknownCursor(event_id)
    return int(match[2], 16)


def _event(found: JobEvent, row: Row) -> Event:
    return Event(
        id=_id(row, found.number),
        job_id=row.public_id,
        created_at=found.created_at,
        level=cast(Level, found.level),
        kind=cast(EventKind, found.kind),
        message=found.message,
        step=found.step,
        data=found.data,
    )
