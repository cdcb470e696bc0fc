"""The schema of training jobs: the queue, and what a job says of itself while it runs.

See `gossamer.jobs` for the rules by which these rows change, and `models` for the rules of schemas.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from gossamer.store.registry.models import Model, UtcDateTime

#: states of a job, as rows have them
QUEUED, RUNNING, PAUSED = "queued", "running", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
#: nothing follows these
FINISHED = (SUCCEEDED, FAILED, CANCELLED)


class Job(Model):
    """One training job. `fence` is raised whenever the right to write to a job changes hands."""

    __tablename__ = "jobs"
    __table_args__ = (sa.Index("ix_jobs_tenant_id_request_digest", "tenant_id", "request_digest"),)

    id: Mapped[int] = mapped_column(primary_key=True)  # grows with the order of submission
    public_id: Mapped[str] = mapped_column(sa.String(32), unique=True)
    tenant_id: Mapped[int] = mapped_column(sa.ForeignKey("tenants.id"))
    status: Mapped[str] = mapped_column(sa.String(16), index=True)
    wanted: Mapped[str | None] = mapped_column(sa.String(16))  # of a running job: cancel, pause
    # what was asked for
    request: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    request_digest: Mapped[str] = mapped_column(sa.String(80))
    seed: Mapped[int] = mapped_column(sa.BigInteger)
    adapter: Mapped[str] = mapped_column(sa.String(128))  # the name that its versions get
    base_fingerprint: Mapped[str] = mapped_column(sa.String(80))
    training_file_id: Mapped[int] = mapped_column(sa.ForeignKey("files.id"), index=True)
    validation_file_id: Mapped[int | None] = mapped_column(sa.ForeignKey("files.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    # who works on it
    worker: Mapped[str | None] = mapped_column(sa.String(128))
    attempt: Mapped[int]  # claims that did not end by the worker's own leave
    fence: Mapped[int] = mapped_column(sa.BigInteger)
    claimed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # the latest claim
    heartbeat_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # how far it is
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # the first claim
    step: Mapped[int | None]
    steps: Mapped[int | None]
    loss: Mapped[float | None] = mapped_column(sa.Double)
    trained_tokens: Mapped[int | None] = mapped_column(sa.BigInteger)
    estimated_finish: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # its events: the number of the last one, how many are kept, and the step up to which thinned
    # metrics are not written anew
    last_event: Mapped[int]
    kept_events: Mapped[int]
    thinned_step: Mapped[int | None]
    # how it ended
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    error: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    version_label: Mapped[str | None] = mapped_column(sa.String(160))
    version_digest: Mapped[str | None] = mapped_column(sa.String(80))
    result_files: Mapped[list[str]] = mapped_column(sa.JSON)


class JobMetadata(Model):
    """A job's metadata once more, one row a pair: what lists are filtered by."""

    __tablename__ = "job_metadata"

    job_id: Mapped[int] = mapped_column(sa.ForeignKey("jobs.id"), primary_key=True)
    key: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    value: Mapped[str] = mapped_column(sa.String(512))


class JobEvent(Model):
    """A line of a job's log. `key` is what makes an event that is written again the same event."""

    __tablename__ = "job_events"
    __table_args__ = (sa.UniqueConstraint("job_id", "key"),)

    job_id: Mapped[int] = mapped_column(sa.ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # from 1, per job
    key: Mapped[str | None] = mapped_column(sa.String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    level: Mapped[str] = mapped_column(sa.String(8))
    kind: Mapped[str] = mapped_column(sa.String(8))
    message: Mapped[str] = mapped_column(sa.Text)
    step: Mapped[int | None]  # of metrics
    data: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))


class JobCheckpoint(Model):
    """A version `name@step-<n>` that a job made on its way."""

    __tablename__ = "job_checkpoints"
    __table_args__ = (sa.UniqueConstraint("job_id", "step"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    public_id: Mapped[str] = mapped_column(sa.String(32), unique=True)
    job_id: Mapped[int] = mapped_column(sa.ForeignKey("jobs.id"))
    step: Mapped[int]
    model: Mapped[str] = mapped_column(sa.String(160))  # the version's label
    digest: Mapped[str] = mapped_column(sa.String(80))
    metrics: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
