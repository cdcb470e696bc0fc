"""Find where the members of a mix meet, over their sorted positions, in O(Σ nnz).

Two bit maps over the weight say where any member is present and where two are; a running count of
the bits set before each word gives every position its rank. Numba, compiled at first use and cached
on disk; it holds no interpreter lock, so a mix is compiled beside the engine's step. Measured for
five members of 1 % of 135M weights on one core: 23 ms; a merge by counters in cache-sized blocks
took 48 ms, concatenating and sorting in numpy 39 ms where AVX-512 sorts and 96 ms elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Alignment(NamedTuple):
    """Where at least `least` members are present.

    Attributes:
        positions: int64 [P], ascending.
        entries: int64 [E], the members' entries at these positions, member by member, each as an
            index into its member's arrays.
        cells: int64 [E], where each belongs in an array of shape [members, P], flat.
        ends: where each member's part of `entries` and `cells` ends.
    """

    positions: NDArray[np.int64]
    entries: NDArray[np.int64]
    cells: NDArray[np.int64]
    ends: list[int]


def align(positions: Sequence[NDArray[np.int64]], least: int, capacity: int) -> Alignment:
    """The positions that at least `least` of the members hold, and the entries there.

    Args:
        positions: int64, strictly increasing in [0, capacity), one array a member.
        least: 1 for the union, 2 for the overlap.
        capacity: how many positions there are.
    """
    from gossamer.merge import bitmaps  # numba takes half a second, which most commands can save

    words = -(-capacity // 64)
    once, twice = np.zeros(words, np.uint64), np.zeros(words, np.uint64)
    met = sum([bitmaps.mark(part, once, twice) for part in positions])
    if least == 1:
        entries_held = sum(part.size for part in positions)
        wanted, held = once, entries_held - met
    else:  # a position with c entries was met c - 1 times
        wanted, held, entries_held = twice, met, 2 * met
    before, found = np.empty(words, np.int64), np.empty(held, np.int64)
    entries, cells = np.empty(entries_held, np.int64), np.empty(entries_held, np.int64)
    if not held:
        return Alignment(found, entries, cells, [0] * len(positions))
    count = bitmaps.rank(wanted, before, found)
    ends, used = [], 0
    for member, part in enumerate(positions):
        used = bitmaps.collect(part, wanted, before, member * count, entries, cells, used)
        ends.append(used)
    return Alignment(found[:count], entries[:used], cells[:used], ends)


def warm_up() -> None:
    """Compile the loops now, about a second where nothing is cached, instead of at first use."""
    one = np.zeros(1, np.int64)
    align([one, one], 2, 1)
