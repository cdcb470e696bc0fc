"""Random positions from a seed, by integer arithmetic alone: the same on every machine.

SpaRTA trains a random mask. Storing the seed instead of the mask leaves 16 bits per bfloat16
nonzero. Sampling gaps in floating point would differ between machines by an ulp of a logarithm, so
the positions are the first k outputs of a keyed permutation of [0, numel): an unbalanced Feistel
network over the next power of two, with cycle walking (Black & Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002). That is sampling *without* replacement, of exactly k positions.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray

#: Seeds are what a JSON reader of any language keeps whole in a signed 64-bit integer.
MAX_SEED = 2**63 - 1
#: Halves of at most 24 bits, so that the arithmetic stays in 32 bits, where vector units are wide.
MAX_NUMEL = 2**48

_ROUNDS = 8
#: The temporaries of a chunk stay in the second-level cache: 26 ns a position against 51 without.
_CHUNK = 1 << 15


def seeded_positions(seed: int, name: str, numel: int, k: int) -> NDArray[np.int64]:
    """`k` distinct positions of [0, numel), ascending, int64 [k].

    A function of (seed, name, numel): the positions for a smaller k are a subset of those for a
    larger one. The work is O(k) on average and O(numel) at worst, whatever the seed: cycle walking
    visits every point outside [0, numel) at most once, and there are fewer than `numel` + 4.

    Args:
        seed: in [0, 2^63).
        name: the weight's name in the base's own naming; other weights get other positions.
        numel: how many positions there are: entries of the weight, or tiles of its grid.
        k: how many to draw, at most `numel`.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be in [0, 2^63), not {seed}")
    if not 0 < numel <= MAX_NUMEL:
        raise ValueError(f"numel must be in [1, 2^48], not {numel}")
    if not 0 <= k <= numel:
        raise ValueError(f"k must be in [0, {numel}], not {k}")
    width = max(2, (numel - 1).bit_length())
    keys = _round_keys(seed, name, numel)
    points = _permute(np.arange(k, dtype=np.int64), width, keys)
    outside = np.flatnonzero(points >= numel)
    while outside.size:
        points[outside] = _permute(points[outside], width, keys)
        outside = outside[points[outside] >= numel]
    points.sort()
    return points


def _round_keys(seed: int, name: str, numel: int) -> NDArray[np.uint32]:
    message = b"gossamer/seeded-positions/1\0" + struct.pack("<QQ", seed, numel) + name.encode()
    return np.frombuffer(hashlib.sha256(message).digest(), dtype="<u4")


def _permute(points: NDArray[np.int64], width: int, keys: NDArray[np.uint32]) -> NDArray[np.int64]:
    """One pass of the network over [0, 2^width), a bijection for any round function."""
    permuted = np.empty_like(points)
    for begin in range(0, points.size, _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        permuted[chunk] = _feistel(points[chunk], width, keys)
    return permuted


def _feistel(points: NDArray[np.int64], width: int, keys: NDArray[np.uint32]) -> NDArray[np.int64]:
    low_bits = width // 2
    high_bits = width - low_bits
    low = (points & ((1 << low_bits) - 1)).astype(np.uint32)
    high = (points >> low_bits).astype(np.uint32)
    for turn in range(_ROUNDS):
        if turn % 2 == 0:
            high ^= _mix(low, keys[turn]) >> np.uint32(32 - high_bits)
        else:
            low ^= _mix(high, keys[turn]) >> np.uint32(32 - low_bits)
    return (high.astype(np.int64) << low_bits) | low


def _mix(half: NDArray[np.uint32], key: np.uint32) -> NDArray[np.uint32]:
    """The finaliser of MurmurHash3 (32 bits) on half ^ key."""
    x = half ^ key
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x
