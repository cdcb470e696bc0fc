"""Claims: what keeps a blob from being collected between its put and its registration.

An upload, of an adapter or of a file, makes one in its first transaction and ends it in its last.
A crash leaves it behind; it counts until the grace is over.
"""

from __future__ import annotations

import logging
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from gossamer.store.catalog.errors import CatalogError, UploadInterrupted
from gossamer.store.catalog.moving import settle_move
from gossamer.store.catalog.parts import Parts
from gossamer.store.catalog.removing import collect_quietly
from gossamer.store.registry.models import ACTIVE, CORRUPT, Blob, Upload, Version

log = logging.getLogger(__name__)


def claim(
    parts: Parts, session: Session, upload_id: str, blob_id: str, nbytes: int, now: datetime
) -> None:
    """Claim a blob, its row made if missing; the row stays locked until the transaction ends.

    Raises:
        BlobMoving: it is on its way out; see `waiting_for_moves`.
    """
    row = _ensure_blob(session, blob_id, nbytes, now)
    settle_move(session, row, parts.moving, owner=parts.owner)
    row.claims += 1
    session.add(Upload(id=upload_id, blob_id=blob_id, started_at=now))
    session.flush()


def settle(session: Session, upload_id: str, blob_id: str, name: str) -> None:
    """End the claim, the blob being in place and locked: now a version or a file must refer to it.

    Raises:
        UploadInterrupted: the claim outlived the grace and is gone, and so may be the blob.
    """
    session.get(Blob, blob_id, with_for_update=True)
    found = session.get(Upload, upload_id)
    if found is None:
        raise UploadInterrupted(name)
    session.delete(found)
    # The bytes are whole again, for whichever version had lost them.
    session.execute(
        sa.update(Version)
        .where(Version.blob_id == blob_id, Version.status == CORRUPT)
        .values(status=ACTIVE)
    )


def abandon(parts: Parts, upload_id: str, blob_id: str) -> None:
    """End the claim of an upload that failed. If even that fails, the grace ends it."""
    try:
        with parts.registry.write() as session:
            session.execute(sa.delete(Upload).where(Upload.id == upload_id))
    except CatalogError as error:
        log.warning("an upload's claim is left to the grace: %s", error)
        return
    collect_quietly(parts, blob_id)


def _ensure_blob(session: Session, blob_id: str, nbytes: int, now: datetime) -> Blob:
    row = session.get(Blob, blob_id, with_for_update=True)
    if row is not None:
        return row
    row = Blob(id=blob_id, nbytes=nbytes, created_at=now)
    try:
        with session.begin_nested():
            session.add(row)
        return row
    except IntegrityError:  # another process was faster; then it is there to be locked
        return session.get_one(Blob, blob_id, with_for_update=True)
