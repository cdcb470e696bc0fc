"""Taking bytes away outside of any transaction: a bucket may need seconds, and other writers wait.

A blob that the owner removes, or moves aside, is `moving` in the registry from the transaction that
decides it to the one that says that it is done. Meanwhile no upload may claim it: the bytes that it
put could be those that go. Who wants to waits (`waiting_for_moves`).

A crash, or a registry that could not be written at the end, leaves the mark behind. It means
nothing then: what moves at this moment is known to the owner's own process, in `Moving`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy.orm import Session

from gossamer.store.catalog.errors import BlobMoving, CatalogError, RegistryBusy
from gossamer.store.registry.database import Registry
from gossamer.store.registry.models import Blob

log = logging.getLogger(__name__)

T = TypeVar("T")
#: A delete takes a bucket some 30 ms.
_AGAIN_S = 0.02


class Moving:
    """What this process takes away at this moment. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: set[str] = set()

    @contextmanager
    def turn(self, blob_id: str) -> Iterator[bool]:
        """Whether the blob is the caller's to take away, as long as the block lasts: no other
        thread is at it."""
        with self._lock:
            mine = blob_id not in self._ids
            if mine:
                self._ids.add(blob_id)
        try:
            yield mine
        finally:
            if mine:
                with self._lock:
                    self._ids.discard(blob_id)

    def __contains__(self, blob_id: str) -> bool:
        with self._lock:
            return blob_id in self._ids


def settle_move(session: Session, row: Blob, moving: Moving, *, owner: bool) -> None:
    """See to it that the locked blob is not on its way out.

    Raises:
        BlobMoving
    """
    if row.moving and not (owner and row.id not in moving):
        raise BlobMoving(row.id)
    row.moving = False
    session.flush()


def end_move(registry: Registry, blob_id: str) -> None:
    """Say that the blob is not on its way out any more. If even that fails, the owner finds out."""
    try:
        with registry.write() as session:
            row = session.get(Blob, blob_id, with_for_update=True)
            if row is not None:
                row.moving = False
    except CatalogError as error:
        log.warning("blob %s stays marked as moving: %s", blob_id, error)


def waiting_for_moves(registry: Registry, claim: Callable[[], T]) -> T:
    """What `claim` returns, a transaction, called until no blob that it claims is on its way out.

    Raises:
        RegistryBusy: that took longer than one waits for the registry.
    """
    deadline = time.monotonic() + registry.busy_timeout_s
    while True:
        try:
            return claim()
        except BlobMoving as error:
            if time.monotonic() > deadline:
                raise RegistryBusy(registry.busy_timeout_s) from error
            time.sleep(_AGAIN_S)
