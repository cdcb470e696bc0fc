"""Delete, collect, quarantine, recover: everything that takes something away.

A delete is a tombstone: one transaction, after which nothing resolves to the version. Its blob goes
later, in the server process only, when no version, no file, no upload in progress and no hold needs
it: one transaction decides that and marks the blob's row as moving, which no upload can claim; then
the bytes go, while nobody waits for the registry; a last transaction removes the row
(`gossamer.store.catalog.moving`). Files are deleted the same way (`gossamer.store.files`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gossamer.store.catalog.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    BlobCorrupt,
    BlobMissing,
    CatalogError,
    CurrentVersion,
    NotOwner,
)
from gossamer.store.catalog.moving import end_move
from gossamer.store.catalog.needs import is_a_versions, is_claimed, is_needed, needed_blobs
from gossamer.store.catalog.parts import Parts
from gossamer.store.catalog.reading import find_live_adapter, live_versions
from gossamer.store.failpoints import Failpoint
from gossamer.store.registry.models import (
    ACTIVE,
    CORRUPT,
    TOMBSTONED,
    Adapter,
    Blob,
    Upload,
    Version,
)
from gossamer.store.registry.tenants import lock_tenant

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovered:
    """What `recover` found: temp files swept, claims of dead uploads ended, blobs removed."""

    temp_files: int
    uploads: int
    blobs: int


def tombstone(parts: Parts, tenant: str, name: str, version: int | str | None) -> list[str]:
    """Delete a version (its number or its tag), or the adapter with all of them.

    Returns the blobs that may be free now. Durable when it returns.

    Raises:
        AdapterNotFound, CurrentVersion, TenantNotFound, RegistryBusy
    """
    mark = ":" if isinstance(version, int) else "@"
    given = name if version is None else f"{name}{mark}{version}"
    with parts.registry.write() as session:
        owner = lock_tenant(session, tenant)
        adapter = find_live_adapter(session, owner, name, given)
        live = live_versions(session, adapter)
        doomed = [v for v in live if version is None or version in (v.number, v.tag)]
        if version is not None:
            if not doomed:
                raise AdapterNotFound(given)
            _guard_current(adapter, live, doomed[0])
        now = parts.clock()
        for row in doomed:
            row.status, row.deleted_at = TOMBSTONED, now
        if all(v.number is None for v in live if v not in doomed):
            adapter.current_number = None
        if len(doomed) == len(live):
            adapter.deleted_at = now
        session.flush()
        parts.failpoint(Failpoint.DELETE_TOMBSTONING)
    parts.failpoint(Failpoint.DELETE_TOMBSTONED)
    return sorted({v.blob_id for v in doomed})


def _guard_current(adapter: Adapter, live: Sequence[Version], doomed: Version) -> None:
    """What a bare name means must not change as a side effect of a delete."""
    others = any(v.number is not None and v is not doomed for v in live)
    if doomed.number is not None and doomed.number == adapter.current_number and others:
        raise CurrentVersion(adapter.name, doomed.number)


def collect(parts: Parts, blob_id: str) -> bool:
    """Unlink a blob unless something needs it; whether it is gone.

    A held blob is collected when its last hold ends (`Holds.claim` remembers it).

    Raises:
        NotOwner, RegistryBusy, BlobStoreFailed
    """
    if not parts.owner:
        raise NotOwner("unlink a blob")
    with parts.moving.turn(blob_id) as mine:
        if not mine or not _begin_removal(parts, blob_id):
            return False
        parts.failpoint(Failpoint.DELETE_CLAIMED)
        try:
            parts.blobs.delete(blob_id)
        except BaseException:
            end_move(parts.registry, blob_id)
            raise
        parts.failpoint(Failpoint.DELETE_UNLINKED)
        with parts.registry.write() as session:
            session.execute(sa.delete(Blob).where(Blob.id == blob_id))
    parts.failpoint(Failpoint.DELETE_COLLECTED)
    return True


def _begin_removal(parts: Parts, blob_id: str) -> bool:
    """Mark a blob as moving unless something needs it; whether it is."""
    with parts.registry.write() as session:
        row = session.get(Blob, blob_id, with_for_update=True)
        if row is None or is_needed(session, blob_id):
            return False
        stale = sa.delete(Upload).where(
            Upload.blob_id == blob_id,
            Upload.started_at < parts.clock() - timedelta(seconds=parts.limits.grace_s),
        )
        session.execute(stale)
        if is_claimed(session, blob_id) or not parts.holds.claim(blob_id):
            return False
        row.moving = True
    return True


def collect_quietly(parts: Parts, blob_id: str) -> None:
    """`collect` where the caller's own work is done and must not fail over a leftover: an error is
    logged, and the blob stays for the next `recover`. Does nothing in a process that is no owner.
    """
    if not parts.owner:
        return
    try:
        collect(parts, blob_id)
    except CatalogError as error:
        log.warning("blob %s is left for the next collection: %s", blob_id, error)


def quarantine(parts: Parts, digest: str, blob_id: str) -> None:
    """Mark a blob's versions corrupt and move it aside; returns normally only if, looked at again,
    it is whole.

    Raises:
        AdapterCorrupt: it is damaged or gone.
        AdapterNotFound: its versions were deleted meanwhile, and so was it.
    """
    why = set_aside(parts, blob_id, f"adapter {digest}")
    if why is None:
        return
    with parts.registry.read() as session:
        if not is_a_versions(session, blob_id):
            raise AdapterNotFound(digest)
    raise AdapterCorrupt(digest, why)


def set_aside(parts: Parts, blob_id: str, user: str) -> str | None:
    """Look again at a blob that read back wrong. If it is damaged and needed, its versions become
    corrupt, and the owner moves it aside.

    Args:
        user: whose bytes these are, for the log.

    Returns what is wrong with it, or None if it is whole.
    """
    with parts.registry.read() as session:
        before = _uploads_of(session, blob_id)
    try:
        with parts.blobs.checkout(blob_id):
            return None
    except (BlobCorrupt, BlobMissing) as error:
        why = "missing" if isinstance(error, BlobMissing) else "its bytes have changed"
    with parts.moving.turn(blob_id) as mine:
        if not mine or not _mark_corrupt(parts, blob_id, before):
            return why
        if parts.owner:
            try:
                parts.blobs.quarantine(blob_id)
            finally:
                end_move(parts.registry, blob_id)
    log.error("blob %s of %s is quarantined: %s", blob_id, user, why)
    return why


def _mark_corrupt(parts: Parts, blob_id: str, before: tuple[int, bool]) -> bool:
    """Mark a blob's versions corrupt, and the blob as moving where it will be; whether it was to be
    done: it is needed, and its bytes are still those that were looked at.

    An upload of the same bytes restores them. There was none if none was under way before they were
    looked at, none is now, and none has begun since.
    """
    with parts.registry.write() as session:
        row = session.get(Blob, blob_id, with_for_update=True)
        is_calm = before == _uploads_of(session, blob_id) and not before[1]
        if row is None or not is_needed(session, blob_id) or not is_calm:
            return False
        session.execute(
            sa.update(Version)
            .where(Version.blob_id == blob_id, Version.status == ACTIVE)
            .values(status=CORRUPT)
        )
        row.moving = parts.owner
    return True


def _uploads_of(session: Session, blob_id: str) -> tuple[int, bool]:
    """How many uploads of a blob have begun, and whether one is under way."""
    row = session.get(Blob, blob_id)
    return (0 if row is None else row.claims), is_claimed(session, blob_id)


def recover(parts: Parts) -> Recovered:
    """Remove what crashes and other processes' deletes left. For the server's start; safe, and
    useful from time to time, while it runs. Other processes may be uploading.

    Raises:
        NotOwner, RegistryBusy, BlobStoreFailed
    """
    if not parts.owner:
        raise NotOwner("recover the store")
    temp_files = parts.blobs.sweep()
    limit = parts.clock() - timedelta(seconds=parts.limits.grace_s)
    with parts.registry.write() as session:
        abandoned = session.execute(
            sa.select(sa.func.count()).select_from(Upload).where(Upload.started_at < limit)
        ).scalar_one()
        session.execute(sa.delete(Upload).where(Upload.started_at < limit))
        known = set(session.execute(sa.select(Blob.id)).scalars())
        needed = needed_blobs(session)
        # What a crash left marked as moving; the others of them are garbage.
        moving = sa.select(Blob).where(Blob.moving).with_for_update()
        for row in session.execute(moving).scalars():
            if row.id in needed and row.id not in parts.moving:
                row.moving = False
    # A file without a row gets one, so that there is a row to lock while it is removed.
    strays = [s for s in parts.blobs.list() if s.blob_id not in known and s.modified < limit]
    for stray in strays:
        with parts.registry.write() as session:
            if session.get(Blob, stray.blob_id, with_for_update=True) is None:
                session.add(Blob(id=stray.blob_id, nbytes=stray.nbytes, created_at=parts.clock()))
    garbage = sorted((known - needed) | {s.blob_id for s in strays})
    removed = sum(collect(parts, blob_id) for blob_id in garbage)
    found = Recovered(temp_files, abandoned, removed)
    if found != Recovered(0, 0, 0):
        log.info("recovered the store: %s", found)
    return found
