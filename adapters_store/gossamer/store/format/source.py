"""Where the bytes of an adapter file come from: memory, a path, or an open file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gossamer.store.errors import AdapterFileError

#: What the readers accept.
Readable = bytes | bytearray | memoryview | str | Path | BinaryIO


class Source:
    """Random access to the bytes. Reads copy, so nothing decoded depends on the file afterwards.

    No memory map: a file that shrinks under a map kills the process with SIGBUS, a short read is
    an error that we can answer.
    """

    def __init__(self, content: memoryview | BinaryIO) -> None:
        self._content = content
        if isinstance(content, memoryview):
            self.size = content.nbytes
        else:
            self.size = content.seek(0, os.SEEK_END)

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`.

        Raises:
            AdapterFileError: the source ends before.
        """
        if isinstance(self._content, memoryview):
            data = bytes(self._content[offset : offset + length])
        else:
            self._content.seek(offset)
            data = self._content.read(length)
        if len(data) != length:
            raise AdapterFileError(
                "invalid_adapter_file",
                f"the file ends after {offset + len(data)} bytes, expected {offset + length}",
            )
        return data


@contextmanager
def open_source(readable: Readable) -> Iterator[Source]:
    """A `Source` over `readable`; a path is opened and closed here, an open file is left open."""
    if isinstance(readable, bytes | bytearray | memoryview):
        yield Source(memoryview(readable).cast("B"))
    elif isinstance(readable, str | Path):
        # O_NONBLOCK: opening a named pipe must not wait for a writer. It does nothing to a file.
        descriptor = os.open(readable, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise AdapterFileError("unsupported_file", "an adapter must be a regular file")
            yield Source(file)
    else:
        yield Source(readable)
