"""Blobs: immutable files named by the sha256 of their bytes, in a folder or an object store.

Layout under the URL: `blobs/<first two digits>/<64 hex digits>`, `quarantine/<64 hex digits>` and,
in a folder, `spool/` for temp files (an object store spools to a local folder instead).

What is durable: a blob is, once `put` returned. In a folder that is write, fsync, rename, fsync of
the directory; an object store's own put is durable when it answers.

Blobs know nothing of who refers to them. Only the catalog may put, quarantine or delete, and only
the catalog of the server process may do the last two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from gossamer.store.catalog.errors import BlobCorrupt, BlobMissing, BlobStoreFailed
from gossamer.store.failpoints import Failpoint, Hook, ignore
from gossamer.store.spool import Spool, no_room_means_full, read_chunks, sweep, sync_folder

if TYPE_CHECKING:
    from obstore.store import ObjectStore  # an alias that exists for type checkers only

#: the default cap of one adapter file, in bytes
UPLOAD_BYTES = 512 << 20
#: Bytes that uploads leave free on the disk. On a disk without a free page even a delete fails,
#: because the registry's log cannot grow, and then nobody can make room.
RESERVE_BYTES = 16 << 20


@dataclass(frozen=True)
class BlobStat:
    """A stored blob: its id, its size in bytes, when it was put."""

    blob_id: str
    nbytes: int
    modified: datetime


class Blobs:
    """A content-addressed store. Thread-safe; several processes may share it.

    Args:
        url: `file:///…` (the folder is made when missing) or any URL obstore knows (`s3://…`).
        spool: where temp files of uploads go. Default, for a folder: its own `spool/`, so that a
            rename stays on one file system. An object store needs it given.
        upload_bytes: cap of one upload.
        reserve_bytes: what uploads leave free on the disk.
        failpoint: see `gossamer.store.failpoints`.
    """

    def __init__(
        self,
        url: str,
        *,
        spool: Path | None = None,
        upload_bytes: int = UPLOAD_BYTES,
        reserve_bytes: int = RESERVE_BYTES,
        failpoint: Hook = ignore,
    ) -> None:
        self.upload_bytes = upload_bytes
        self._reserve_bytes = reserve_bytes
        self._failpoint = failpoint
        self._root: Path | None = None
        self._store: ObjectStore
        if url.startswith("file:"):
            local = LocalStore.from_url(url, mkdir=True)
            self._store, self._root = local, Path(str(local.prefix))
            spool = self._root / "spool"
            for name in ("blobs", "quarantine"):
                (self._root / name).mkdir(exist_ok=True)
        else:
            self._store = from_url(url)
        if spool is None:
            raise ValueError(f"{url!r} is not a folder: name a local folder for temp files")
        spool.mkdir(parents=True, exist_ok=True)
        self._spool = spool

    def spool(self, limit: int | None = None) -> Spool:
        """A temp file for one upload of at most `limit` bytes (default: `upload_bytes`). The caller
        discards it (or uses it as a context)."""
        return Spool(
            self._spool,
            self.upload_bytes if limit is None else limit,
            reserve=self._reserve_bytes,
            failpoint=self._failpoint,
        )

    def put(self, spool: Spool) -> str:
        """Store the sealed bytes under their sha256 and return it; durable when this returns.

        A blob that is there already is overwritten by the same bytes: that restores a damaged one,
        and an upload takes equally long whether or not another tenant sent the same file.

        Raises:
            StoreFull, BlobStoreFailed
        """
        blob_id = spool.blob_id
        spool.seal()
        with _failures("put a blob"), no_room_means_full():
            if self._root is None:
                obstore.put(self._store, _key(blob_id), spool.path)
            else:
                target = self._root / _key(blob_id)
                if not target.parent.exists():
                    target.parent.mkdir(exist_ok=True)
                    sync_folder(target.parent.parent)
                obstore.rename(self._store, f"spool/{spool.path.name}", _key(blob_id))
                self._failpoint(Failpoint.UPLOAD_RENAMED)
                sync_folder(target.parent)
        self._failpoint(Failpoint.UPLOAD_STORED)
        return blob_id

    @contextmanager
    def checkout(self, blob_id: str) -> Iterator[Path]:
        """The blob as a local file, its hash verified on entry; the file may vanish on exit.

        Costs one read and one sha256 of the blob (measured: 0.36 GB/s on one busy core).

        Raises:
            BlobMissing: there is none.
            BlobCorrupt: its bytes are not those that were put.
            BlobStoreFailed
        """
        if self._root is not None:
            path = self._root / _key(blob_id)
            self._verify(blob_id, path)
            yield path
            return
        with Spool(self._spool, self.stat(blob_id).nbytes) as copy:
            with _failures("read a blob", blob_id):
                for chunk in obstore.get(self._store, _key(blob_id)):
                    copy.write(bytes(chunk))
            copy.seal()
            if copy.blob_id != blob_id:
                raise BlobCorrupt(blob_id, copy.blob_id)
            yield copy.path

    def stat(self, blob_id: str) -> BlobStat:
        """Size and age without reading the bytes.

        Raises:
            BlobMissing, BlobStoreFailed
        """
        with _failures("look up a blob", blob_id):
            meta = obstore.head(self._store, _key(blob_id))
        return BlobStat(blob_id, meta["size"], meta["last_modified"])

    def list(self) -> Iterator[BlobStat]:
        """Every stored blob, in no order; quarantined ones are not among them."""
        with _failures("list the blobs"):
            for batch in obstore.list(self._store, prefix="blobs"):
                for meta in batch:
                    blob_id = meta["path"].rpartition("/")[2]
                    yield BlobStat(blob_id, meta["size"], meta["last_modified"])

    def delete(self, blob_id: str) -> None:
        """Remove a blob; none there is no error. Durable when this returns."""
        try:
            with _failures("delete a blob", blob_id):
                obstore.delete(self._store, _key(blob_id))
        except BlobMissing:
            return
        if self._root is not None:
            sync_folder((self._root / _key(blob_id)).parent)

    def quarantine(self, blob_id: str) -> None:
        """Move a damaged blob aside, for an operator to look at; none there is no error."""
        try:
            with _failures("quarantine a blob", blob_id):
                obstore.rename(self._store, _key(blob_id), f"quarantine/{blob_id}")
        except BlobMissing:
            return
        if self._root is not None:
            sync_folder((self._root / _key(blob_id)).parent)
            sync_folder(self._root / "quarantine")

    def sweep(self) -> int:
        """Remove temp files that dead processes left; returns how many."""
        return sweep(self._spool)

    def _verify(self, blob_id: str, path: Path) -> None:
        found = hashlib.sha256()
        try:
            for chunk in read_chunks(path):
                found.update(chunk)
        except FileNotFoundError as error:
            raise BlobMissing(blob_id) from error
        except OSError as error:
            raise BlobStoreFailed("read a blob", str(error.strerror)) from error
        if found.hexdigest() != blob_id:
            raise BlobCorrupt(blob_id, found.hexdigest())


def _key(blob_id: str) -> str:
    return f"blobs/{blob_id[:2]}/{blob_id}"


@contextmanager
def _failures(operation: str, blob_id: str = "") -> Iterator[None]:
    """obstore's errors as ours. It reports a missing object as FileNotFoundError."""
    try:
        yield
    except FileNotFoundError as error:
        if not blob_id:
            raise BlobStoreFailed(operation, "a file vanished meanwhile") from error
        raise BlobMissing(blob_id) from error
    except BaseError as error:
        # The first line says what; what follows is the library's debug dump with full paths.
        raise BlobStoreFailed(operation, str(error).partition("\n")[0]) from error
