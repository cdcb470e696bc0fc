"""What is packed: the entries of one delta on one weight, of masks that occur."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: (out, in) of the packed weights of one layer of Llama-3.1-8B.
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
#: Share of the entries.
DENSITIES = (0.0005, 0.001, 0.006, 0.01, 0.1)
MASKS = ("uniform", "uneven")
#: Rows of an uneven mask have log-normal densities; with 1 the densest percent of the rows has ten
#: times as many entries as the median.
SIGMA = 1.0
#: Elements that are drawn at a time.
_CHUNK = 1 << 23


@dataclass(frozen=True, eq=False, slots=True)
class Entries:
    """Entries by row, columns increasing within a row.

    Attributes:
        rows, columns: of the weight.
        starts: int64 [rows + 1], where each row begins.
        column: int64 [n].
        value: float32 [n], exact in bfloat16.
    """

    rows: int
    columns: int
    starts: NDArray[np.int64]
    column: NDArray[np.int64]
    value: NDArray[np.float32]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Entries of each row."""
        return np.diff(self.starts)

    @property
    def row(self) -> NDArray[np.int64]:
        """The row of each entry."""
        return np.repeat(np.arange(self.rows), self.lengths)

    @property
    def bits(self) -> NDArray[np.uint16]:
        """The values as the bits of bfloat16."""
        return (self.value.view(np.uint32) >> 16).astype(np.uint16)


def from_mask(mask: NDArray[np.bool_], generator: np.random.Generator) -> Entries:
    """Normal values where the mask is set."""
    row, column = np.nonzero(mask)
    starts = np.concatenate(([0], np.cumsum(mask.sum(axis=1))))
    rows, columns = mask.shape
    return Entries(rows, columns, starts, column, _values(len(row), generator))


def random_entries(shape: tuple[int, int], density: float, mask: str, seed: int) -> Entries:
    """A random mask.

    Args:
        shape: of the weight.
        density: the expected share of entries.
        mask: "uniform": all elements alike. "uneven": each row with a density of its own.
        seed: of everything random.
    """
    rows, columns = shape
    generator = np.random.default_rng(seed)
    share = np.full(rows, density, np.float32)
    if mask == "uneven":
        share = generator.lognormal(0, SIGMA, rows).astype(np.float32)
        share = np.minimum(share * np.float32(density / share.mean()), np.float32(0.9))
    lengths, found = [], []
    for first in range(0, rows, max(_CHUNK // columns, 1)):
        some = share[first : first + max(_CHUNK // columns, 1)]
        hit = generator.random((len(some), columns), np.float32) < some[:, None]
        lengths.append(hit.sum(axis=1))
        found.append(np.nonzero(hit)[1])
    starts = np.concatenate(([0], np.cumsum(np.concatenate(lengths))))
    column = np.concatenate(found)
    return Entries(rows, columns, starts, column, _values(len(column), generator))


def _values(count: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Normal values, cut to bfloat16."""
    value = generator.standard_normal(count, np.float32)
    return np.bitwise_and(value.view(np.uint32), np.uint32(0xFFFF0000)).view(np.float32)
