"""The compiled loops of `gossamer.merge.align`; importing this imports numba.

They hold no interpreter lock. Indices are unsigned, so that none is tested for being negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

_Function = TypeVar("_Function", bound=Callable[..., Any])

_ONE = np.uint64(1)
_LOW = np.uint64(63)
_WORD = np.uint64(6)


def _compiled(function: _Function) -> _Function:
    """`function`, compiled at its first call; kept on disk where there is a folder for it."""
    made: _Function
    try:
        made = numba.njit(function, cache=True, nogil=True)
    except RuntimeError:  # numba's word for: a read-only installation and no home to cache in
        made = numba.njit(function, nogil=True)
    return made


@_compiled
def population(bits: Any) -> Any:
    """How many bits of a uint64 are set, as in Hacker's Delight."""
    bits -= (bits >> _ONE) & np.uint64(0x5555555555555555)
    pairs = np.uint64(0x3333333333333333)
    bits = (bits & pairs) + ((bits >> np.uint64(2)) & pairs)
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((bits * np.uint64(0x0101010101010101)) >> np.uint64(56))


@_compiled
def mark(positions: Any, once: Any, twice: Any) -> int:
    """Set the bits of one member's positions in `once`; in `twice` where they were set before.

    Returns how many were.
    """
    met = 0
    for position in positions:
        unsigned = np.uint64(position)
        word = unsigned >> _WORD
        bit = _ONE << (unsigned & _LOW)
        seen = once[word]
        once[word] = seen | bit
        if seen & bit:
            twice[word] |= bit
            met += 1
    return met


@_compiled
def rank(wanted: Any, before: Any, found: Any) -> int:
    """List the positions of the set bits, and for each word how many come before it."""
    count = 0
    for word in range(wanted.size):
        before[word] = count
        bits = wanted[word]
        while bits:
            lowest = bits & (~bits + _ONE)
            found[count] = (word << 6) + population(lowest - _ONE)
            count += 1
            bits ^= lowest
    return count


@_compiled
def collect(
    positions: Any, wanted: Any, before: Any, offset: int, entries: Any, cells: Any, used: int
) -> int:
    """One member's entries at the wanted positions, from `used` on; returns where they end.

    A cell is the rank of the entry's position, plus `offset`.
    """
    for at in range(positions.size):
        unsigned = np.uint64(positions[at])
        word = unsigned >> _WORD
        bit = _ONE << (unsigned & _LOW)
        bits = wanted[word]
        if bits & bit:
            entries[used] = at
            cells[used] = offset + before[word] + population(bits & (bit - _ONE))
            used += 1
    return used
