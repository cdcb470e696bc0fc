"""Upload: stage, put, register.

    stage     one transaction: early refusals, and a claim on the blob, so that no process collects
              it between its put and its registration
    put       the bytes, durable, outside any transaction
    register  one transaction: the quota, the version, the current pointer; the claim ends

A crash leaves a temp file, a claim, or a blob without a version. None is visible, and `recover`
removes all three.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gossamer.store.catalog.claims import abandon, claim, settle
from gossamer.store.catalog.intake import Facts
from gossamer.store.catalog.moving import waiting_for_moves
from gossamer.store.catalog.parts import Parts
from gossamer.store.catalog.quota import Wanted, check_quota
from gossamer.store.catalog.reading import version_info
from gossamer.store.catalog.removing import collect_quietly
from gossamer.store.catalog.views import VersionInfo
from gossamer.store.failpoints import Failpoint
from gossamer.store.registry.models import ACTIVE, TOMBSTONED, Adapter, Tenant, Version
from gossamer.store.registry.tenants import lock_tenant
from gossamer.store.spool import Spool

#: What another room writes in the transaction that makes a version visible, told of the version.
Also = Callable[[Session, VersionInfo], None]
#: Which other checkpoints, by tag, go when one appears; asked in the transaction in which they do.
Outdated = Callable[[Session], Collection[str]]


@dataclass(frozen=True)
class Order:
    """What was asked for. The registry gives the number; a tag means a checkpoint."""

    tenant: str
    name: str
    activate: bool
    tag: str | None
    also: Also | None = None
    outdated: Outdated | None = None


def upload(parts: Parts, order: Order, spool: Spool, facts: Facts) -> VersionInfo:
    """Store a validated upload. See `door.Catalog.upload` for the contract."""
    upload_id = secrets.token_hex(16)
    known = waiting_for_moves(parts.registry, lambda: _stage(parts, order, facts, upload_id))
    if known is not None:
        return known
    try:
        parts.blobs.put(spool)
        info, replaced = _register(parts, order, facts, upload_id)
    except BaseException:
        abandon(parts, upload_id, facts.blob_id)
        raise
    parts.failpoint(Failpoint.UPLOAD_REGISTERED)
    for blob_id in replaced:
        collect_quietly(parts, blob_id)
    return info


def _stage(parts: Parts, order: Order, facts: Facts, upload_id: str) -> VersionInfo | None:
    """Claim the blob; or answer at once when the upload is there already."""
    now = parts.clock()
    with parts.registry.write() as session:
        tenant = lock_tenant(session, order.tenant)
        adapter = _find_adapter(session, tenant, order.name)
        version = _find_same(session, adapter, order, facts)
        if version is not None and adapter is not None and version.status == ACTIVE:
            return _finish(session, order, adapter, version)
        if version is None:
            _make_room(parts, session, tenant, adapter, order, facts)
        claim(parts, session, upload_id, facts.blob_id, facts.nbytes, now)
        parts.failpoint(Failpoint.UPLOAD_STAGING)
    parts.failpoint(Failpoint.UPLOAD_STAGED)
    return None


def _register(
    parts: Parts, order: Order, facts: Facts, upload_id: str
) -> tuple[VersionInfo, list[str]]:
    """Make the version; returns it and the blobs of the checkpoints that go for it."""
    now = parts.clock()
    with parts.registry.write() as session:
        tenant = lock_tenant(session, order.tenant)
        settle(session, upload_id, facts.blob_id, order.name)
        adapter = _find_adapter(session, tenant, order.name)
        version = _find_same(session, adapter, order, facts)
        replaced: list[str] = []
        if version is None:
            going = _make_room(parts, session, tenant, adapter, order, facts)
            adapter = adapter or _new_adapter(session, tenant, order.name, now)
            replaced = _remove(session, going)
            version = _new_version(adapter, order, facts, now)
            session.add(version)
        if adapter is None:
            raise RuntimeError("a version without its adapter")
        info = _finish(session, order, adapter, version)
        parts.failpoint(Failpoint.UPLOAD_REGISTERING)
    return info, replaced


def _find_adapter(session: Session, tenant: Tenant, name: str) -> Adapter | None:
    query = sa.select(Adapter).where(Adapter.tenant_id == tenant.id, Adapter.name == name)
    return session.execute(query).scalar_one_or_none()


def _find_same(
    session: Session, adapter: Adapter | None, order: Order, facts: Facts
) -> Version | None:
    """The version that this upload repeats: the same digest as the current one, the newest one, or
    the checkpoint of the same tag. A damaged one counts only if these very bytes restore it."""
    if adapter is None or adapter.deleted_at is not None:
        return None
    mine = sa.select(Version).where(
        Version.adapter_id == adapter.id,
        Version.status != TOMBSTONED,
        Version.base_fingerprint == facts.base_fingerprint,
    )
    if order.tag is not None:
        candidates = list(session.execute(mine.where(Version.tag == order.tag)).scalars())
    else:
        numbered = mine.where(Version.number.is_not(None)).order_by(Version.number.desc())
        # Not of `mine`: where there is no current number, that would be any checkpoint.
        current = numbered.where(Version.number == adapter.current_number)
        candidates = [
            *session.execute(current).scalars(),
            *session.execute(numbered.limit(1)).scalars(),
        ]
    for version in candidates:
        same_bytes = version.blob_id == facts.blob_id
        if version.digest == facts.digest and (version.status == ACTIVE or same_bytes):
            return version
    return None


def _new_adapter(session: Session, tenant: Tenant, name: str, now: datetime) -> Adapter:
    adapter = Adapter(
        tenant_id=tenant.id, name=name, current_number=None, last_number=0, created_at=now
    )
    session.add(adapter)
    session.flush()
    return adapter


def _new_version(adapter: Adapter, order: Order, facts: Facts, now: datetime) -> Version:
    adapter.deleted_at = None
    if order.tag is None:
        adapter.last_number += 1
    return Version(
        adapter_id=adapter.id,
        number=adapter.last_number if order.tag is None else None,
        tag=order.tag,
        digest=facts.digest,
        blob_id=facts.blob_id,
        nbytes=facts.nbytes,
        nnz=facts.nnz,
        density=facts.density,
        modules=facts.modules,
        record=facts.record,
        warnings=facts.warnings,
        base_fingerprint=facts.base_fingerprint,
        base_verified=facts.base_verified,
        status=ACTIVE,
        created_at=now,
    )


def _going(session: Session, adapter: Adapter | None, order: Order) -> Sequence[Version]:
    """The checkpoints that the ordered one takes the place of: that of the same tag, which a job
    that was resumed writes anew, and those that it makes outdated."""
    if adapter is None or order.tag is None:
        return []
    tags = {order.tag, *(order.outdated(session) if order.outdated is not None else ())}
    query = sa.select(Version).where(
        Version.adapter_id == adapter.id, Version.tag.in_(tags), Version.status != TOMBSTONED
    )
    return session.execute(query).scalars().all()


def _make_room(
    parts: Parts, session: Session, tenant: Tenant, adapter: Adapter | None, order: Order,
    facts: Facts,
) -> Sequence[Version]:  # fmt: skip
    """The checkpoints that go for the ordered version; without them it is within the quota.

    Raises:
        QuotaExceeded
    """
    going = _going(session, adapter, order)
    ids = [version.id for version in going]
    wanted = Wanted(order.name, facts.blob_id, facts.nbytes, order.tag is not None, ids)
    check_quota(session, parts.limits, tenant.id, wanted)
    return going


def _remove(session: Session, going: Sequence[Version]) -> list[str]:
    """Delete checkpoints; returns their blobs. Not as tombstones: a number is never given again,
    which a tombstone remembers, but a tag may be, and a job would leave one for every step."""
    for version in going:
        session.delete(version)
    session.flush()
    return sorted({version.blob_id for version in going})


def _finish(session: Session, order: Order, adapter: Adapter, version: Version) -> VersionInfo:
    """The last of a registration, or of an upload that repeats a version."""
    if order.activate and version.number is not None:
        adapter.current_number = version.number
    session.flush()
    info = version_info(version, adapter, order.tenant)
    if order.also is not None:
        order.also(session, info)
        session.flush()
    return info
