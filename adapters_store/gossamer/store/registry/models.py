"""The schema: who owns which versions and files, and which blob holds each one's bytes.

Portable: nothing here is particular to SQLite or PostgreSQL. The tables are made by the numbered
migrations and never by `create_all`; a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

#: states of a version: served; deleted; its stored bytes found damaged
ACTIVE, TOMBSTONED, CORRUPT = "active", "tombstoned", "corrupt"


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """An aware datetime in UTC on every database; SQLite keeps no offset, so it is put back."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To the database; a naive time is refused, for nobody could say what it means."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(
        self,
        value: datetime | None,
        dialect: Dialect,  # noqa: ARG002 - SQLAlchemy's signature
    ) -> datetime | None:
        """From the database, always aware."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Model(DeclarativeBase):
    """Base class of the tables; constraint names are spelled out, for migrations to name them."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Tenant(Model):
    """Whoever owns adapters and keys. Tenants are not deleted."""

    __tablename__ = "tenants"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(128), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ApiKey(Model):
    """One key: its public id and an HMAC-SHA-256 of its text. The text itself is nowhere."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    tenant_id: Mapped[int] = mapped_column(sa.ForeignKey("tenants.id"), index=True)
    mac: Mapped[bytes] = mapped_column(sa.LargeBinary(32))
    scope: Mapped[str] = mapped_column(sa.String(16))
    label: Mapped[str] = mapped_column(sa.String(128))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Adapter(Model):
    """A tenant's name. The row outlives a deletion, so that a number never means two things."""

    __tablename__ = "adapters"
    __table_args__ = (sa.UniqueConstraint("tenant_id", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = mapped_column(sa.ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(sa.String(128))
    current_number: Mapped[int | None]  # of the version that the bare name means
    last_number: Mapped[int]  # highest number ever given
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Identity(Model):
    """Which registry this is, in one row: the blob store that is its own carries the id as a mark
    (`gossamer.store.catalog.owning`)."""

    __tablename__ = "identity"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # always 1
    id: Mapped[str] = mapped_column(sa.String(32))


class Blob(Model):
    """A stored file. Its row is what uploads and collection lock, one before the other; `moving`
    lets the owner go on when the transaction is over (`gossamer.store.catalog.moving`)."""

    __tablename__ = "blobs"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)  # sha256 of the bytes
    nbytes: Mapped[int] = mapped_column(sa.BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    claims: Mapped[int] = mapped_column(default=0)  # how many uploads of it have begun
    moving: Mapped[bool] = mapped_column(default=False)  # the owner takes the bytes away


class File(Model):
    """What a tenant sent to train on, or a job's results; a tombstone once deleted."""

    __tablename__ = "files"

    id: Mapped[int] = mapped_column(primary_key=True)  # grows with the order of registration
    public_id: Mapped[str] = mapped_column(sa.String(32), unique=True)
    tenant_id: Mapped[int] = mapped_column(sa.ForeignKey("tenants.id"), index=True)
    filename: Mapped[str] = mapped_column(sa.String(255))
    purpose: Mapped[str] = mapped_column(sa.String(32))
    blob_id: Mapped[str] = mapped_column(sa.String(64), index=True)  # no foreign key: see Version
    nbytes: Mapped[int] = mapped_column(sa.BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Upload(Model):
    """A claim on a blob from before it is put until its version or file is registered.

    While there is one, nobody collects the blob, in whichever process the upload runs.
    """

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    blob_id: Mapped[str] = mapped_column(sa.ForeignKey("blobs.id"), index=True)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)


class Version(Model):
    """What one upload said, immutable but for its status. A checkpoint has a tag and no number."""

    __tablename__ = "versions"
    __table_args__ = (
        sa.UniqueConstraint("adapter_id", "number"),
        sa.Index("ix_versions_adapter_id_tag", "adapter_id", "tag"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    adapter_id: Mapped[int] = mapped_column(sa.ForeignKey("adapters.id"))
    number: Mapped[int | None]
    tag: Mapped[str | None] = mapped_column(sa.String(32))
    digest: Mapped[str] = mapped_column(sa.String(80), index=True)
    # No foreign key: a tombstone keeps its blob's id after the blob and its row are gone.
    blob_id: Mapped[str] = mapped_column(sa.String(64), index=True)
    nbytes: Mapped[int] = mapped_column(sa.BigInteger)
    nnz: Mapped[int] = mapped_column(sa.BigInteger)
    density: Mapped[float] = mapped_column(sa.Double)
    modules: Mapped[list[dict[str, Any]]] = mapped_column(sa.JSON)
    record: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    warnings: Mapped[list[str]] = mapped_column(sa.JSON)
    base_fingerprint: Mapped[str] = mapped_column(sa.String(80))
    base_verified: Mapped[bool]
    status: Mapped[str] = mapped_column(sa.String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
