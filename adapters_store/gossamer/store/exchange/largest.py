"""The largest of a stream of magnitudes, in memory for twice as many as are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Cut:
    """Which of a stream are the largest: all above `bits`, and of those equal, the first `ties`."""

    bits: int
    ties: int


class Largest:
    """Finds the cut that keeps exactly `count` of what passes by.

    Magnitudes are their float32 bits without the sign, which order as they do.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"the largest {count} of a stream are nothing")
        self._count = count
        self._held: list[NDArray[np.uint32]] = []
        self._size = 0
        self._floor = -1  # no smaller one, and no further equal one, is among the largest

    def add(self, bits: NDArray[np.uint32]) -> None:
        """The next part of the stream, [n]."""
        above = bits if self._floor < 0 else bits[bits > self._floor]
        self._held.append(np.array(above))
        self._size += above.size
        if self._size >= 2 * self._count:
            self._shrink()

    def cut(self) -> Cut:
        """Where to cut; with no more than `count` in the stream, everything is kept."""
        if self._size > self._count:
            self._shrink()
        if self._floor < 0:
            return Cut(-1, 0)
        held = np.concatenate(self._held)
        return Cut(self._floor, self._count - int((held > self._floor).sum()))

    def _shrink(self) -> None:
        held = np.concatenate(self._held)
        self._held.clear()
        held.partition(held.size - self._count)
        kept: NDArray[Any] = np.array(held[held.size - self._count :])
        self._held.append(kept)
        self._size = kept.size
        self._floor = int(kept[0])
