"""Uploads on their way in: a temp file with a byte cap, hashed while it is written.

A temp file is locked (`flock`) by the process that writes it, from its creation until it is renamed
into the store or discarded. The lock dies with the process, so whoever sweeps can tell an upload
that still runs in another process from one whose process was killed, without guessing by age.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Self

from gossamer.store.catalog.errors import StoreFull, UploadTooLarge
from gossamer.store.failpoints import Failpoint, Hook, ignore

SUFFIX = ".part"
CHUNK = 1 << 20

#: what the kernel says when there is no room: the disk, the user's quota, the file size limit
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Spool:
    """One upload's bytes. Write, then `seal`; leaving the context discards what was not kept.

    Not thread-safe: one writer at a time (the API may feed it chunk by chunk from a worker thread).

    Args:
        folder: where the temp file goes.
        limit: cap of the upload in bytes.
        reserve: bytes that must stay free on the disk.
        failpoint: see `gossamer.store.failpoints`.
    """

    def __init__(
        self, folder: Path, limit: int, *, reserve: int = 0, failpoint: Hook = ignore
    ) -> None:
        self.limit = limit
        self.size = 0
        self._reserve = reserve
        self.path, self._file = _create_locked(folder)
        self._hash = hashlib.sha256()
        self._failpoint = failpoint
        self._sealed = False

    @property
    def blob_id(self) -> str:
        """sha256 of the bytes written so far, as 64 hex digits."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`.

        Raises:
            UploadTooLarge: the total would pass the limit; nothing of `data` is written.
            StoreFull: no room on the disk, or only the reserve.
        """
        if self.size + len(data) > self.limit:
            raise UploadTooLarge(self.limit)
        if shutil.disk_usage(self.path.parent).free < len(data) + self._reserve:
            raise StoreFull("blobs", f"less than {self._reserve} bytes would be left on the disk")
        with no_room_means_full():
            self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
        self._failpoint(Failpoint.UPLOAD_SPOOLING)

    def seal(self) -> None:
        """Make the bytes durable (fsync). May be called again; no write may follow."""
        if self._sealed:
            return
        self._failpoint(Failpoint.UPLOAD_SPOOLED)
        with no_room_means_full():
            self._file.flush()
            os.fsync(self._file.fileno())
        self._sealed = True
        self._failpoint(Failpoint.UPLOAD_SYNCED)

    def discard(self) -> None:
        """Remove the temp file, unless it was renamed into the store, and end the lock."""
        if self._file.closed:
            return
        self.path.unlink(missing_ok=True)
        # A full disk fails the flush inside close() as well; the bytes are unwanted by now.
        try:
            self._file.close()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


@contextmanager
def no_room_means_full() -> Iterator[None]:
    """Turn the kernel's "no room" errors into `StoreFull`."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StoreFull("blobs", os.strerror(error.errno)) from error
        raise


def sweep(folder: Path) -> int:
    """Remove the temp files of dead processes; returns how many. Safe while others upload."""
    removed = 0
    for path in sorted(folder.glob("*" + SUFFIX)):
        try:
            file = path.open("rb")
        except FileNotFoundError:  # its writer finished meanwhile
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def read_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file in pieces of at most 1 MiB."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: an fsync of a file does not cover its directory entry."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _create_locked(folder: Path) -> tuple[Path, BinaryIO]:
    """A new, locked, empty temp file."""
    while True:
        path = folder / (secrets.token_hex(16) + SUFFIX)
        with no_room_means_full():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        file = os.fdopen(handle, "wb", buffering=CHUNK)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return path, file
        file.close()  # swept between its creation and its lock
