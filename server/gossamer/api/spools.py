"""The files of one upload while they arrive: a spool each, one cap over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gossamer.store.catalog.errors import UploadTooLarge
from gossamer.store.spool import Spool

#: Some bytes of a file, by its place among the files of the upload.
Piece = tuple[int, bytes]


class Spools:
    """Temp files, made as the files come and discarded together.

    Blocks: for a worker thread, one call at a time.

    Args:
        make: a new spool; the limit of the first is that of all of them together.
    """

    def __init__(self, make: Callable[[], Spool]) -> None:
        self._make = make
        self._spools: list[Spool] = []
        self._size = 0

    def __getitem__(self, index: int) -> Spool:
        return self._spools[index]

    def write(self, pieces: Sequence[Piece]) -> None:
        """Append each piece to its file. A file begins with its first piece, also an empty one.

        Raises:
            UploadTooLarge, StoreFull
        """
        for index, data in pieces:
            while len(self._spools) <= index:
                self._spools.append(self._make())
            self._size += len(data)
            if self._size > (limit := self._spools[0].limit):
                raise UploadTooLarge(limit)
            self._spools[index].write(data)

    def discard(self) -> None:
        """Remove what was not kept."""
        for spool in self._spools:
            spool.discard()
