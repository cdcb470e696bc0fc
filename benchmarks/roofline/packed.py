"""What `gossamer.kernels.pack` writes for a uniform random mask, and what a kernel does with it.

Every element of the weight is an entry with the same probability, the density p; q = 1 - p. All
figures are expectations. `gossamer.kernels.gpu.layout` describes the forms.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from gossamer.kernels.gpu import layout
from gossamer.kernels.gpu.element import ROWS

Coding = Literal["bfloat16", "int8"]
FORM_NAMES: Final = ("PAIR", "WORD", "GROUP", "SPLIT8", "GROUP8")

#: Instructions of a thread for each place of an entry that it goes through, for a chunk of 1 and of
#: 16 rows, in units of one entry and of several: counted in the code for sm_90
#: (docs/decisions/element-layouts.md). Between them a line.
_INSTRUCTIONS: Final = {1: (14.5, 76.0), 5: (11.4, 67.0), 7: (11.4, 67.0)}


@dataclass(frozen=True, slots=True)
class Packed:
    """One adapter's delta on one weight, as expected.

    Attributes:
        rows, columns, density: of the weight and the mask.
        form: of `gossamer.kernels.gpu.layout`.
        units: of all rows.
        slope: by how much the units of a row grow with one more entry.
        parts: bytes of what `pack` writes: units, starts, lengths, then what the form has more.
    """

    rows: int
    columns: int
    density: float
    form: int
    units: float
    slope: float
    parts: tuple[float, ...]

    @property
    def entries(self) -> float:
        """Nonzeros."""
        return self.rows * self.columns * self.density

    @property
    def read_bytes(self) -> float:
        """Bytes that a kernel reads, all metadata included."""
        return sum(self.parts)

    @property
    def stored_bytes(self) -> float:
        """Bytes of the buffer, which is what a load copies."""
        return layout.ALIGN + sum(layout.align(math.ceil(part)) for part in self.parts)

    def instructions(self, width: int) -> float:
        """Instructions, over all threads, to apply it to a chunk of so many rows.

        All rows of a program wait for its longest, so threads go through more places than there are
        entries: lanes × E[longest row, in rounds of all lanes] × rows.

        Args:
            width: 1, 2, 4, 8 or 16.
        """
        size = layout.UNIT_ENTRIES[self.form]
        mean, entries = self.units / self.rows, self.columns * self.density
        cumulative = _binomial(self.columns, self.density)
        units = np.arange(0, self.columns + layout.LANES, layout.LANES)
        reached = np.floor(entries + (units - mean) / self.slope).astype(np.int64)
        within = np.where(reached < 0, 0.0, cumulative[np.clip(reached, 0, self.columns)])
        longest = float(np.sum(1 - within**ROWS))
        places = layout.LANES * size * longest * self.rows
        first, last = _INSTRUCTIONS[size]
        return places * (first + (last - first) * (width - 1) / 15)


@functools.cache
def expected(rows: int, columns: int, density: float, coding: Coding) -> Packed:
    """The expected packed delta of a random mask.

    Raises:
        ValueError: the density is not within (0, 1).
    """
    if not 0 < density < 1:
        raise ValueError(f"a density is between 0 and 1, not {density}")
    single, grouped = (
        (layout.SPLIT8, layout.GROUP8) if coding == "int8" else (layout.WORD, layout.GROUP)
    )
    single_bytes = 3 if coding == "int8" else layout.UNIT_BYTES[single]
    entries = columns * density
    groups = _groups(columns, density, layout.UNIT_ENTRIES[grouped])
    better = groups * layout.UNIT_BYTES[grouped] < single_bytes * entries
    form, units = (grouped, groups) if better else (single, entries)
    padded = layout.padded(rows)
    parts = [rows * units * layout.UNIT_BYTES[form], 4 * padded / layout.TILE_ROWS, float(padded)]
    slope = 1.0 if form == single else _slope(columns, density, layout.UNIT_ENTRIES[form])
    # A second byte for every row, if one has more entries than 255 units hold.
    limit = math.floor(entries + (0xFF - units) / slope)
    within = float(_binomial(columns, density)[min(limit, columns)]) if limit >= 0 else 0.0
    parts.append(padded * (1 - within**rows))
    if coding == "int8":
        parts.append(2.0 * padded)
        if form == single:
            parts.append(rows * entries)
    return Packed(rows, columns, density, form, rows * units, slope, tuple(parts))


@functools.cache
def _groups(columns: int, density: float, size: int) -> float:
    """Expected units of a row, of up to `size` entries with gaps of up to 255.

    e(c, k), the probability that column c has an entry in slot k of its unit, is
        e(c, 0) = p (q^min(c, 255) + Σ_{g=1..255} q^(g-1) e(c - g, size - 1)),
        e(c, k) = p Σ_{g=1..255} q^(g-1) e(c - g, k - 1):
    an entry begins a unit if none lies within 255 columns before it, or if the one before it, g
    columns away, has filled its own. The units are Σ_c e(c, 0). Far from the row's beginning, and
    with b = q^255, that is b / (1 - (1 - b)^size) of the entries.
    """
    p, q = density, 1 - density
    reach = layout.MAX_GAP
    found = np.zeros((reach + columns, size))
    before = np.zeros(size)  # Σ_g q^(g-1) e(c - g, k), carried along
    units = 0.0
    for c in range(columns):
        here = found[reach + c]
        here[1:] = before[:-1]
        here[0] = before[-1] + q ** min(c, reach)
        here *= p
        units += float(here[0])
        before = here + q * before - q**reach * found[c]
    return units


def _slope(columns: int, density: float, size: int) -> float:
    """How the units of a row grow with its entries: a fuller row has fewer gaps over 255."""
    near = 0.98 * density
    more = _groups(columns, density, size) - _groups(columns, near, size)
    return more / (columns * (density - near))


@functools.cache
def _binomial(count: int, p: float) -> NDArray[np.float64]:
    """P(at most k of `count`), for k from 0 to `count`."""
    k = np.arange(count)
    steps = np.log((count - k) / (k + 1)) + math.log(p / (1 - p))
    logarithms = count * math.log1p(-p) + np.concatenate(([0.0], np.cumsum(steps)))
    cumulative: NDArray[np.float64] = np.minimum(np.cumsum(np.exp(logarithms)), 1.0)
    return cumulative


def block_bytes(rows: int, columns: int, density: float, side: int) -> float:
    """Bytes of a random delta of tiles: bfloat16 values, a column a tile, a pointer a tile row."""
    tiles = -(-rows // side) * -(-columns // side) * density
    return tiles * (2 * side * side + 2) + 4 * (-(-rows // side) + 1)
