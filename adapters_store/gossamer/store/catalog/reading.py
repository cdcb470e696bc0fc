"""Reading the registry: from references to versions, and from rows to what callers see."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gossamer.store.catalog.errors import AdapterNotFound, WrongBase
from gossamer.store.catalog.names import Ref
from gossamer.store.catalog.views import (
    AdapterInfo,
    ModuleInfo,
    Resolved,
    Status,
    Usage,
    VersionInfo,
)
from gossamer.store.registry.models import ACTIVE, TOMBSTONED, Adapter, Tenant, Version

# Built once: composing a statement of this size costs as much again as running it.
_VERSIONS = (
    sa.select(
        Version.number,
        Version.tag,
        Version.digest,
        Version.blob_id,
        Version.nbytes,
        Version.nnz,
        Version.base_fingerprint,
    )
    .join(Adapter, Adapter.id == Version.adapter_id)
    .join(Tenant, Tenant.id == Adapter.tenant_id)
    .where(Tenant.name == sa.bindparam("tenant"), Adapter.name == sa.bindparam("name"))
    .where(Version.status == ACTIVE)
    .order_by(Version.id.desc())
    .limit(1)
)
_BY_CURRENT = _VERSIONS.where(Version.number == Adapter.current_number)
_BY_NUMBER = _VERSIONS.where(Version.number == sa.bindparam("number"))
_BY_DIGEST = _VERSIONS.where(Version.digest == sa.bindparam("digest"))
_ANYWHERE = (
    sa.select(Version.id)
    .join(Adapter, Adapter.id == Version.adapter_id)
    .join(Tenant, Tenant.id == Adapter.tenant_id)
    .where(Tenant.name == sa.bindparam("tenant"), Version.digest == sa.bindparam("digest"))
    .where(Version.status == ACTIVE)
    .limit(1)
)
_BY_TAG = _VERSIONS.where(Version.tag == sa.bindparam("tag"))


def find_version(session: Session, tenant: str, ref: Ref, fingerprint: str | None) -> Resolved:
    """The active version that `ref` means to `tenant`. Reads no JSON: this is on every request.

    Args:
        fingerprint: of the base to be served with; None accepts any.

    Raises:
        AdapterNotFound: there is none, or it is another tenant's.
        WrongBase: it is the tenant's, but for another base.
    """
    wanted = {
        # Another tenant's name takes the same query as one's own, and matches nothing.
        "tenant": tenant if ref.tenant is None or ref.tenant == tenant else None,
        "name": ref.name,
        "number": ref.number,
        "digest": ref.digest,
        "tag": ref.tag,
    }
    row = session.execute(_lookup(ref), wanted).first()
    if row is None:
        raise AdapterNotFound(ref.given)
    if fingerprint is not None and row.base_fingerprint != fingerprint:
        raise WrongBase(ref.given, row.base_fingerprint, fingerprint)
    return Resolved(
        given=ref.given,
        tenant=tenant,
        name=ref.name,
        number=row.number,
        tag=row.tag,
        digest=row.digest,
        blob_id=row.blob_id,
        nbytes=row.nbytes,
        nnz=row.nnz,
    )


def _lookup(ref: Ref) -> sa.Executable:
    if ref.number is not None:
        return _BY_NUMBER
    if ref.digest is not None:
        return _BY_DIGEST
    return _BY_TAG if ref.tag is not None else _BY_CURRENT


def has_version(session: Session, tenant: str, digest: str) -> bool:
    """Whether an active version of the tenant, under whatever name, has this digest."""
    wanted = {"tenant": tenant, "digest": digest}
    return session.execute(_ANYWHERE, wanted).first() is not None


def find_blobs(session: Session, digest: str, fingerprint: str) -> list[str]:
    """The blobs of active versions that encode `digest` for this base."""
    query = (
        sa.select(Version.blob_id)
        .where(Version.digest == digest, Version.status == ACTIVE)
        .where(Version.base_fingerprint == fingerprint)
        .distinct()
    )
    return list(session.execute(query).scalars())


def read_adapters(session: Session, tenant: str, name: str | None = None) -> list[AdapterInfo]:
    """A tenant's adapters by name, or the one of `name`; deleted ones are left out."""
    query = (
        sa.select(Adapter)
        .join(Tenant, Tenant.id == Adapter.tenant_id)
        .where(Tenant.name == tenant, Adapter.deleted_at.is_(None))
        .order_by(Adapter.name)
    )
    if name is not None:
        query = query.where(Adapter.name == name)
    adapters = list(session.execute(query).scalars())
    versions = session.execute(
        sa.select(Version)
        .where(Version.adapter_id.in_([a.id for a in adapters]), Version.status != TOMBSTONED)
        .order_by(Version.id)
    ).scalars()
    by_adapter: dict[int, list[Version]] = {a.id: [] for a in adapters}
    for version in versions:
        by_adapter[version.adapter_id].append(version)
    return [adapter_info(a, by_adapter[a.id], tenant) for a in adapters]


def find_live_adapter(session: Session, tenant: Tenant, name: str, given: str) -> Adapter:
    """The tenant's adapter, not deleted.

    Raises:
        AdapterNotFound
    """
    adapter = session.execute(
        sa.select(Adapter).where(
            Adapter.tenant_id == tenant.id, Adapter.name == name, Adapter.deleted_at.is_(None)
        )
    ).scalar_one_or_none()
    if adapter is None:
        raise AdapterNotFound(given)
    return adapter


def live_versions(session: Session, adapter: Adapter) -> Sequence[Version]:
    """An adapter's versions without the tombstones, oldest first."""
    query = sa.select(Version).where(Version.adapter_id == adapter.id, Version.status != TOMBSTONED)
    return session.execute(query.order_by(Version.id)).scalars().all()


def read_usage(session: Session, tenant: int | None, *, without: Collection[int] = ()) -> Usage:
    """What a tenant (by id) keeps at this moment, as its quota counts it; `without` are ids of
    versions that are about to go."""
    counted = (
        sa.select(Version.adapter_id, Version.blob_id, Version.nbytes, Version.tag)
        .join(Adapter, Adapter.id == Version.adapter_id)
        .where(Adapter.tenant_id == tenant, Version.status != TOMBSTONED)
        .where(Version.id.not_in(without))
    ).subquery()
    files = (
        sa.select(sa.func.max(counted.c.nbytes).label("nbytes"))
        .group_by(counted.c.blob_id)
        .subquery()
    )
    adapters = session.execute(
        sa.select(sa.func.count(sa.distinct(counted.c.adapter_id))).where(counted.c.tag.is_(None))
    ).scalar_one()
    total = session.execute(sa.select(sa.func.coalesce(sa.func.sum(files.c.nbytes), 0)))
    return Usage(adapters, int(total.scalar_one()))


def adapter_info(adapter: Adapter, versions: Sequence[Version], tenant: str) -> AdapterInfo:
    """Rows as a value."""
    return AdapterInfo(
        tenant=tenant,
        name=adapter.name,
        current=adapter.current_number,
        created_at=adapter.created_at,
        versions=tuple(version_info(v, adapter, tenant) for v in versions),
    )


def version_info(version: Version, adapter: Adapter, tenant: str) -> VersionInfo:
    """A row as a value."""
    return VersionInfo(
        tenant=tenant,
        name=adapter.name,
        number=version.number,
        tag=version.tag,
        digest=version.digest,
        blob_id=version.blob_id,
        nbytes=version.nbytes,
        nnz=version.nnz,
        density=version.density,
        modules=tuple(_module(m) for m in version.modules),
        record=version.record,
        warnings=tuple(version.warnings),
        base_fingerprint=version.base_fingerprint,
        base_verified=version.base_verified,
        status=cast(Status, version.status),
        created_at=version.created_at,
        current=version.number is not None and version.number == adapter.current_number,
    )


def _module(fields: dict[str, Any]) -> ModuleInfo:
    return ModuleInfo(**{**fields, "shape": tuple(fields["shape"])})
