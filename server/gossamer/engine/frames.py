"""Where things lie in a device's one block of memory. No tensors.

The block is cut into *frames* of the size of a KV page (of all layers). A page takes any frame; an
adapter takes a *run* of neighbouring ones. Pages fill the block from below and runs from above.
When the free frames are enough but not neighbours, pages move aside: what stores a page knows it by
its number, and its frame is looked up when a step is laid out. Runs do not move, since the kernels'
tables hold addresses inside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_FREE, _RUN = -1, -2


@dataclass(frozen=True)
class Run:
    """Neighbouring frames [first, first + count)."""

    first: int
    count: int


@dataclass(frozen=True)
class Move:
    """A page's content goes from one frame to another."""

    source: int
    target: int


class Frames:
    """`count` frames, and who has them.

    Attributes:
        of_page: int64 [count]: the frame of each page; of one that holds nothing, any.
    """

    def __init__(self, count: int) -> None:
        self.of_page: NDArray[np.int64] = np.arange(count)
        self._holds: NDArray[np.int64] = np.full(count, _FREE, np.int64)

    @property
    def free(self) -> int:
        """Frames that hold nothing."""
        return int((self._holds == _FREE).sum())

    @property
    def pages(self) -> int:
        """Frames that hold KV pages."""
        return int((self._holds >= 0).sum())

    def take(self, page: int) -> None:
        """Give a page the lowest free frame. The caller has checked `free`."""
        frame = int(np.argmax(self._holds == _FREE))
        self.of_page[page], self._holds[frame] = frame, page

    def drop(self, page: int) -> None:
        """The page holds nothing any more."""
        self._holds[self.of_page[page]] = _FREE

    def take_run(self, count: int) -> tuple[Run, list[Move]] | None:
        """Neighbouring frames, where fewest pages must move, of those the highest.

        Returns:
            the run, and the moves to be made before it is written; None when other runs lie
            between the free frames, or there are too few.
        """
        first = self._window(count)
        if first is None:
            return None
        inside = self._holds[first : first + count]
        moving = [int(page) for page in inside if page >= 0]
        inside[:] = _RUN
        moves = []
        for page in moving:
            source = int(self.of_page[page])
            self.take(page)
            moves.append(Move(source, int(self.of_page[page])))
        return Run(first, count), moves

    def drop_run(self, run: Run) -> None:
        """The run holds nothing any more."""
        self._holds[run.first : run.first + run.count] = _FREE

    def _window(self, count: int) -> int | None:
        total = len(self._holds)
        if not 0 < count <= total or self.free < count:
            return None
        kinds = (self._holds == _RUN, self._holds >= 0)
        in_runs, in_pages = (np.concatenate(([0], np.cumsum(kind))) for kind in kinds)
        crossed = in_runs[count:] - in_runs[:-count]
        moved = in_pages[count:] - in_pages[:-count]
        cost = np.where(crossed > 0, total + 1, moved)
        best = total - count - int(np.argmin(cost[::-1]))
        return best if cost[best] <= total else None

    def check_integrity(self) -> None:
        """Raise `RuntimeError` unless pages and frames agree."""
        frames = np.flatnonzero(self._holds >= 0)
        if not np.array_equal(self.of_page[self._holds[frames]], frames):
            raise RuntimeError("a KV page is not where its frame says")
