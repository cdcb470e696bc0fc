"""Whose blobs they are: those of one registry, and of no other.

What a registry does not know it collects, and what it knows and does not find it gives up. So two
servers on one blob store would remove each other's blobs, and one on an empty store would lose its
versions. Therefore a store carries a mark, the id of the registry that it belongs to.

A store without a mark is taken if nothing speaks against it: both sides are empty, or it holds
blobs that the registry knows, as where both were made before there were marks.
"""

from __future__ import annotations

import logging
import secrets

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from gossamer.store.blobs import Blobs
from gossamer.store.catalog.errors import BlobsNotOurs
from gossamer.store.catalog.needs import usable_blobs
from gossamer.store.registry.database import Registry
from gossamer.store.registry.models import Blob, Identity

log = logging.getLogger(__name__)


def check_owner(registry: Registry, blobs: Blobs) -> None:
    """Whether the blobs are the registry's own, which they become where both are new. Any process.

    Raises:
        BlobsNotOurs
        RegistryBusy, StoreFull, BlobStoreFailed
    """
    mark = _identity(registry)
    found = blobs.owner()
    if found is None:
        _check_unmarked(registry, blobs, mark)
        blobs.claim(mark)
        found = blobs.owner()
        log.info("the blob store is marked as this registry's, %s", mark)
    if found != mark:
        raise BlobsNotOurs(
            f"it is marked as that of another one, {(found or 'unknown')[:32]!r}", mark
        )


def _identity(registry: Registry) -> str:
    """The registry's id, made if it has none."""
    with registry.read() as session:
        known = session.get(Identity, 1)
    if known is not None:
        return known.id
    with registry.write() as session:
        try:
            with session.begin_nested():
                session.add(Identity(number=1, id=secrets.token_hex(16)))
        except IntegrityError:  # another process was faster
            pass
        return session.get_one(Identity, 1, populate_existing=True).id


def _check_unmarked(registry: Registry, blobs: Blobs, mark: str) -> None:
    with registry.read() as session:
        needed = usable_blobs(session)
        known = set(session.execute(sa.select(Blob.id)).scalars())
    stored = {stat.blob_id for stat in blobs.list()}
    if needed and not needed & stored:
        why = f"it holds none of the {len(needed)} blobs that the registry knows"
        raise BlobsNotOurs(f"{why}, and no mark", mark)
    if stored and not known & stored:
        why = f"it holds {len(stored)} blobs that the registry does not know"
        raise BlobsNotOurs(f"{why}, and no mark", mark)
