"""A data folder, opened: the registry migrated, the secret at hand, the catalog ready.

registry.sqlite3   the registry, unless a database is named by URL
key.secret         the HMAC key of the API keys, mode 0600
store/             blobs, quarantine and temp files, unless an object store is named by URL
spool/             temp files, if one is: of uploads, and of blobs while they are read
owner.lock         locked by the one process that may unlink blobs
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Self

from gossamer.store.blobs import RESERVE_BYTES, UPLOAD_BYTES, Blobs
from gossamer.store.blobs_url import check_blobs_url
from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.errors import AlreadyOwned
from gossamer.store.catalog.owning import check_owner
from gossamer.store.catalog.views import BaseInfo, StoreLimits
from gossamer.store.clock import utc_now
from gossamer.store.failpoints import Hook, ignore
from gossamer.store.keys import KeyRing, load_secret
from gossamer.store.registry.database import Registry


def open_registry(data: Path, url: str | None = None, *, busy_timeout_s: float = 5.0) -> Registry:
    """The data folder's registry, made and migrated as needed; the caller closes it. Any process.

    Raises:
        RegistryTooNew, RegistryBusy, StoreFull
    """
    data.mkdir(parents=True, exist_ok=True)
    registry = Registry(
        url or f"sqlite:///{data / 'registry.sqlite3'}", busy_timeout_s=busy_timeout_s
    )
    try:
        registry.migrate()
    except BaseException:
        registry.close()
        raise
    return registry


def open_keys(
    data: Path, registry: Registry, *, clock: Callable[[], datetime] = utc_now
) -> KeyRing:
    """The keys of a data folder; needs no base model. Any process that may read the secret.

    Raises:
        KeySecretUnsafe
    """
    return KeyRing(registry, load_secret(data / "key.secret"), clock=clock)


class Store:
    """Registry, keys, catalog and files of one data folder; use as a context, or `close`.

    Args:
        data: the folder, made if missing.
        base: the base model being served.
        owner: True in the server process, which then recovers what a crash left.
        database_url, blobs_url: a database or an object store in place of the folder's own.
        limits: quotas.
        upload_bytes, reserve_bytes: cap of one adapter file; what uploads leave free on the disk.

    Raises:
        AlreadyOwned: another server process runs on this folder.
        BlobsUrlInvalid: before anything is made.
        BlobStoreFailed: the blob store does not answer, does not let us in, or is not there.
        BlobsNotOurs: it is another registry's, or not where this one's blobs are.
        RegistryTooNew, RegistryBusy, KeySecretUnsafe, StoreFull
    """

    def __init__(
        self,
        data: Path,
        base: BaseInfo,
        *,
        owner: bool = False,
        database_url: str | None = None,
        blobs_url: str | None = None,
        limits: StoreLimits | None = None,
        upload_bytes: int = UPLOAD_BYTES,
        reserve_bytes: int = RESERVE_BYTES,
        busy_timeout_s: float = 5.0,
        clock: Callable[[], datetime] = utc_now,
        failpoint: Hook = ignore,
    ) -> None:
        if blobs_url is not None:
            check_blobs_url(blobs_url)
        with ExitStack() as stack:
            self.registry = open_registry(data, database_url, busy_timeout_s=busy_timeout_s)
            stack.callback(self.registry.close)
            if owner:
                lock = stack.enter_context((data / "owner.lock").open("ab"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise AlreadyOwned(data) from error
            self.keys = open_keys(data, self.registry, clock=clock)
            blobs = Blobs(
                blobs_url or (data / "store").absolute().as_uri(),
                spool=data / "spool" if blobs_url else None,
                upload_bytes=upload_bytes,
                reserve_bytes=reserve_bytes,
                failpoint=failpoint,
            )
            if blobs_url is not None:  # a bucket that is not there must not pass for an empty one
                blobs.check()
            check_owner(self.registry, blobs)
            self.catalog = Catalog(
                self.registry,
                blobs,
                base,
                limits=limits,
                clock=clock,
                owner=owner,
                failpoint=failpoint,
            )
            self.files = self.catalog.files
            stack.callback(self.catalog.close)
            if owner:
                self.catalog.recover()
            self._closing = stack.pop_all()

    def close(self) -> None:
        """Finish collecting, close the registry, give up the ownership."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
