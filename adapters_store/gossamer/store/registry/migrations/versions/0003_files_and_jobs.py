"""Training files, and the jobs that use them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the tables `files`, `jobs` and what belongs to a job."""
    _files()
    _jobs()
    _parts_of_jobs()


def _time(name: str, *, nullable: bool = True) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _files() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("public_id", sa.String(32), nullable=False),
        sa.Column("tenant_id", sa.Integer, nullable=False),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("blob_id", sa.String(64), nullable=False),
        sa.Column("nbytes", sa.BigInteger, nullable=False),
        _time("created_at", nullable=False),
        _time("deleted_at"),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_files_tenant_id"),
        sa.UniqueConstraint("public_id", name="uq_files_public_id"),
    )
    op.create_index("ix_files_tenant_id", "files", ["tenant_id"])
    op.create_index("ix_files_blob_id", "files", ["blob_id"])


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("public_id", sa.String(32), nullable=False),
        sa.Column("tenant_id", sa.Integer, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("wanted", sa.String(16)),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("request_digest", sa.String(80), nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("adapter", sa.String(128), nullable=False),
        sa.Column("base_fingerprint", sa.String(80), nullable=False),
        sa.Column("training_file_id", sa.Integer, nullable=False),
        sa.Column("validation_file_id", sa.Integer),
        _time("created_at", nullable=False),
        sa.Column("worker", sa.String(128)),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("fence", sa.BigInteger, nullable=False),
        *map(_time, ("claimed_at", "heartbeat_at", "lease_until", "started_at")),
        sa.Column("step", sa.Integer),
        sa.Column("steps", sa.Integer),
        sa.Column("loss", sa.Double),
        sa.Column("trained_tokens", sa.BigInteger),
        _time("estimated_finish"),
        sa.Column("last_event", sa.Integer, nullable=False),
        sa.Column("kept_events", sa.Integer, nullable=False),
        sa.Column("thinned_step", sa.Integer),
        _time("finished_at"),
        sa.Column("error", sa.JSON),
        sa.Column("version_label", sa.String(160)),
        sa.Column("version_digest", sa.String(80)),
        sa.Column("result_files", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_jobs_tenant_id"),
        sa.ForeignKeyConstraint(
            ["training_file_id"], ["files.id"], name="fk_jobs_training_file_id"
        ),
        sa.ForeignKeyConstraint(
            ["validation_file_id"], ["files.id"], name="fk_jobs_validation_file_id"
        ),
        sa.UniqueConstraint("public_id", name="uq_jobs_public_id"),
    )
    op.create_index("ix_jobs_status", "jobs", ["status"])
    op.create_index("ix_jobs_tenant_id_request_digest", "jobs", ["tenant_id", "request_digest"])
    op.create_index("ix_jobs_training_file_id", "jobs", ["training_file_id"])
    op.create_index("ix_jobs_validation_file_id", "jobs", ["validation_file_id"])


def _parts_of_jobs() -> None:
    op.create_table(
        "job_metadata",
        sa.Column("job_id", sa.Integer, nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("value", sa.String(512), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "key", name="pk_job_metadata"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_metadata_job_id"),
    )
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.Integer, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("key", sa.String(64)),
        _time("created_at", nullable=False),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("step", sa.Integer),
        sa.Column("data", sa.JSON),
        sa.PrimaryKeyConstraint("job_id", "number", name="pk_job_events"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_events_job_id"),
        sa.UniqueConstraint("job_id", "key", name="uq_job_events_job_id_key"),
    )
    op.create_table(
        "job_checkpoints",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("public_id", sa.String(32), nullable=False),
        sa.Column("job_id", sa.Integer, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("model", sa.String(160), nullable=False),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        _time("created_at", nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_job_checkpoints"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_checkpoints_job_id"),
        sa.UniqueConstraint("public_id", name="uq_job_checkpoints_public_id"),
        sa.UniqueConstraint("job_id", "step", name="uq_job_checkpoints_job_id_step"),
    )
