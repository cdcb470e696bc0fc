"""Blobs: immutable files named by the sha256 of their bytes, in a folder or an object store.

Layout under the URL: `blobs/<first two digits>/<64 hex digits>`, `quarantine/<64 hex digits>`,
`owner` with the mark of whose they are and, in a folder, `spool/` for temp files (an object store
spools to a local folder instead).

What is durable: a blob is, once `put` returned. In a folder that is write, fsync, rename, fsync of
the directory; an object store's own put is durable when it answers.

An object store's credentials and endpoint come from the environment, as obstore reads them
(`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL` and so on), and from nowhere else.

Blobs know nothing of who refers to them. Only the catalog may put, quarantine or delete, and only
the catalog of the server process may do the last two.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PreconditionError,
)
from obstore.store import LocalStore, from_url

from gossamer.store.blobs_url import check_blobs_url
from gossamer.store.catalog.errors import BlobCorrupt, BlobMissing, BlobStoreFailed
from gossamer.store.failpoints import Failpoint, Hook, ignore
from gossamer.store.spool import Spool, no_room_means_full, read_chunks, sweep, sync_folder

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig  # exist for type checkers only

#: the default cap of one adapter file, in bytes
UPLOAD_BYTES = 512 << 20
#: Bytes that uploads leave free on the disk. On a disk without a free page even a delete fails,
#: because the registry's log cannot grow, and then nobody can make room.
RESERVE_BYTES = 16 << 20
#: A store that is away is reported within seconds. By default obstore tries ten times, for up to
#: three minutes: longer than any request waits, with a thread of the server held all the while. One
#: that accepts connections and says nothing takes a request's timeout: 30 seconds, or AWS_TIMEOUT.
RETRIES: RetryConfig = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=15),
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=2),
        "base": 2,
    },
}
#: Blobs are read in ranges and written in parts, because that timeout is of a whole request: one
#: of half a gigabyte would need 18 MB/s. With these, 1 MB/s is enough. S3 takes parts from 5 MiB.
RANGE_BYTES = 8 << 20
PART_BYTES, PARTS_AT_ONCE = 5 << 20, 4

_OWNER, _MARK_BYTES = "owner", 256


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
            self._store = _object_store(url)
        if spool is None:
            raise ValueError(f"{url!r} is not a folder: name a local folder for temp files")
        spool.mkdir(parents=True, exist_ok=True)
        self._spool = spool

    def check(self) -> None:
        """Whether the store answers and lets us in.

        Raises:
            BlobStoreFailed
        """
        _reach(self._store)

    def owner(self) -> str | None:
        """The mark of whose blobs these are; None if there is none.

        Raises:
            BlobStoreFailed
        """
        with _failures("read the owner's mark"):
            try:
                found = obstore.get(self._store, _OWNER)
            except FileNotFoundError:
                found = None
            if found is not None:
                if found.meta["size"] > _MARK_BYTES:
                    return ""  # none of ours
                return bytes(found.bytes()).decode("ascii", "replace").strip()
        if self._root is None:
            self.check()  # a bucket that is gone answers like a mark that is not there
        return None

    def claim(self, mark: str) -> None:
        """Mark the blobs, unless they are marked: of two who do it at the same time one comes
        first, and `owner` tells who. Durable when this returns.

        Raises:
            BlobStoreFailed, StoreFull
        """
        with _failures("write the owner's mark"), no_room_means_full():
            if self._root is None:
                _create(self._store, _OWNER, mark.encode())
                return
            with Spool(self._spool, _MARK_BYTES) as draft:
                draft.write(mark.encode())
                draft.seal()
                try:
                    os.link(draft.path, self._root / _OWNER)
                except FileExistsError:
                    return
                except OSError:  # a file system without hard links
                    draft.path.rename(self._root / _OWNER)
            sync_folder(self._root)

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
                obstore.put(
                    self._store,
                    _key(blob_id),
                    spool.path,
                    chunk_size=PART_BYTES,
                    max_concurrency=PARTS_AT_ONCE,
                )
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
        nbytes = self.stat(blob_id).nbytes
        with Spool(self._spool, nbytes) as copy:
            for start in range(0, nbytes, RANGE_BYTES):
                end = min(start + RANGE_BYTES, nbytes)
                with self._looking_up("read a blob", blob_id):
                    part = obstore.get_range(self._store, _key(blob_id), start=start, end=end)
                copy.write(memoryview(part))
            copy.seal()
            if copy.blob_id != blob_id:
                raise BlobCorrupt(blob_id, copy.blob_id)
            yield copy.path

    def stat(self, blob_id: str) -> BlobStat:
        """Size and age without reading the bytes.

        Raises:
            BlobMissing, BlobStoreFailed
        """
        with self._looking_up("look up a blob", blob_id):
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
            with self._looking_up("delete a blob", blob_id):
                obstore.delete(self._store, _key(blob_id))
        except BlobMissing:
            return
        if self._root is not None:
            sync_folder((self._root / _key(blob_id)).parent)

    def quarantine(self, blob_id: str) -> None:
        """Move a damaged blob aside, for an operator to look at; none there is no error."""
        try:
            with self._looking_up("quarantine a blob", blob_id):
                obstore.rename(self._store, _key(blob_id), f"quarantine/{blob_id}")
        except BlobMissing:
            return
        if self._root is not None:
            sync_folder((self._root / _key(blob_id)).parent)
            sync_folder(self._root / "quarantine")

    def sweep(self) -> int:
        """Remove temp files that dead processes left; returns how many."""
        return sweep(self._spool)

    @contextmanager
    def _looking_up(self, operation: str, blob_id: str) -> Iterator[None]:
        """`_failures`, and BlobMissing where the store has no such blob. A bucket that is gone
        answers like a key that is gone, and a version whose blob is missing is given up for good:
        so the store is asked for something that it must have."""
        with _failures(operation):
            try:
                yield
                return
            except FileNotFoundError as error:
                missing = error
        if self._root is None:
            self.check()
        raise BlobMissing(blob_id) from missing

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


def _create(store: ObjectStore, path: str, data: bytes) -> None:
    """Put an object where there is none; one that is there stays."""
    try:
        obstore.put(store, path, data, mode="create")
    except (AlreadyExistsError, PreconditionError):
        return
    except BaseError as error:
        # Some stores that speak S3's protocol have no `If-None-Match`. Two servers that start for
        # the first time at the same moment are then told apart at their next start.
        if not isinstance(error, NotSupportedError) and "501" not in _answer(error):
            raise
        obstore.put(store, path, data)


def reach(url: str) -> None:
    """Whether the object store at `url` answers and lets us in; nothing is changed. A folder's URL
    passes: it is made when it is missing.

    Raises:
        BlobsUrlInvalid, BlobStoreFailed
    """
    check_blobs_url(url)
    if not url.startswith("file:"):
        _reach(_object_store(url))


def _object_store(url: str) -> ObjectStore:
    with _failures("open"):
        return from_url(url, retry_config=RETRIES)


def _reach(store: ObjectStore) -> None:
    """Ask for the list of blobs, and for its first page only."""
    with _failures("list the blobs"):
        next(iter(obstore.list(store, prefix="blobs", chunk_size=1)), None)


@contextmanager
def _failures(operation: str) -> Iterator[None]:
    """obstore's errors as ours. Where a blob is looked up, FileNotFoundError means another thing;
    see `_looking_up`."""
    try:
        yield
    except FileNotFoundError as error:
        raise BlobStoreFailed(operation, _answer(error) or "a file vanished meanwhile") from None
    except BaseError as error:
        # The first line says what. What follows is the library's debug dump with all that the
        # server sent, and some stores send a session token back that they refuse: hence `from None`
        first = str(error).partition("\n")[0]
        raise BlobStoreFailed(operation, _answer(error) or first.rpartition(" - ")[2]) from None


def _answer(error: Exception) -> str:
    """What the server answered: a status, and S3's own word for what is wrong (`NoSuchBucket`),
    nothing else of its text; empty when it did not answer."""
    text = str(error)
    status = re.search(r"status code: (\d{3}(?: [A-Z][A-Za-z]*)*)", text)
    if status is None:
        return ""
    word = re.search(r"<Code>([A-Za-z]{1,64})</Code>", text)
    return f"it answered {status[1]}" + (f", {word[1]}" if word else "")
