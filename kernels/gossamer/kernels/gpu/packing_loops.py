"""The packer's compiled loops; importing this imports numba, which `packing` can do without.

They run in one thread and hold no interpreter lock: a loader's thread does not delay a step. numpy
wants an index array of int64 for each of its passes and packs 4 to 30 M entries/s on one core;
these loops read the positions once and pack 60 to 270 M (`python -m benchmarks.packing`).

The constants of the layout are arguments: numba's disk cache notices a change of this file only.
Entries come in the order of their positions, which `count` has checked before any other loop runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.kernels.delta import Piece
from gossamer.kernels.gpu import layout

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: Entries are numbered unsigned, so that none is tested for being negative.
_ZERO = np.uint64(0)


def _compiled(function: _Function) -> _Function:
    """`function`, compiled at its first call; kept on disk where there is a folder for it."""
    made: _Function
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        made = numba.njit(function, cache=True, **options)
    except RuntimeError:  # numba's word for: a read-only installation and no home to cache in
        made = numba.njit(function, **options)
    return made


@_compiled
def count(
    positions: Any, bits: Any, width: int, size: int, max_gap: int,
    columns: Any, lengths: Any, groups: Any, largest: Any,
) -> bool:  # fmt: skip
    """Semantics: each entry's column; entries, greedy groups and largest |value| of each row.

    All in one loop, because the branch at a row's end is guessed wrong once a row, which is most
    of what rows of a few entries cost. The columns save the loops behind it the rows.

    Args:
        positions: int64 [n], row * width + column.
        bits: uint32 [n], of float32 values; they order like the magnitudes. Or empty.
        size, max_gap: entries of a full group, and the largest gap inside one.
        columns: uint16 [n]; written.
        lengths, groups: int64 [rows], zero; written.
        largest: uint32 [rows], zero; written if there are bits.

    Returns:
        False where the positions do not strictly increase within [0, rows * width).
    """
    limit, valued = len(lengths) * width, len(bits) > 0
    row, end, before = -1, 0, -1
    entries, units, slot, most = 0, 0, 0, np.uint32(0)
    for i in range(np.uint64(len(positions))):
        position = positions[i]
        if position <= before or position >= limit:
            return False
        if position >= end:
            if row >= 0:
                lengths[row], groups[row], largest[row] = entries, units, most
            # A division takes 20 cycles or more, and most rows follow each other.
            row = row + 1 if position < end + width else position // width
            end = (row + 1) * width
            entries, units, slot, most = 0, 0, size, np.uint32(0)
        closed = slot == size or position - before > max_gap
        slot = 1 if closed else slot + 1
        units += 1 if closed else 0
        entries += 1
        columns[i] = position - end + width
        if valued:
            most = max(most, bits[i] & np.uint32(0x7FFFFFFF))
        before = position
    if row >= 0:
        lengths[row], groups[row], largest[row] = entries, units, most
    return True


@_compiled
def quantise(values: Any, lengths: Any, divisors: Any, coded: Any) -> None:
    """Semantics: coded = rint(values / divisors[row]).

    Divided, not multiplied by the inverse, which rounds some values to the other neighbour.

    Args:
        values: float32 [n].
        lengths: int64 [rows].
        divisors: float32 [rows], with every quotient in [-127.5, 127.5].
        coded: int8 [n]; written.
    """
    end = _ZERO
    for r in range(len(lengths)):
        start, end = end, end + np.uint64(lengths[r])
        divisor = divisors[r]
        for i in range(start, end):
            coded[i] = np.int8(np.int32(np.rint(values[i] / divisor)))


@_compiled
def join(columns: Any, coded: Any, shift: int, units: Any) -> None:
    """Semantics: units = column | coded << shift, in the type of the units.

    Args:
        columns: uint16 [n].
        coded: unsigned [n], the bits of the values.
        units: uint32 or uint64 [n]; written.
    """
    for i in range(np.uint64(len(columns))):
        units[i] = np.int64(columns[i]) | (np.int64(coded[i]) << shift)


@_compiled
def group(
    columns: Any, coded: Any, lengths: Any, size: int, max_gap: int, value_at: int, units: Any
) -> None:
    """Semantics: the entries in greedy groups of a column, gaps and values.

    Args:
        columns: uint16 [n].
        coded: uint8 or uint16 [n], the bits of the values.
        lengths: int64 [rows].
        size, max_gap: as for `count`.
        value_at: first bit of the values in a unit; the gaps begin at bit 16.
        units: uint64 [groups, 2]; written.
    """
    width = 8 * coded.itemsize
    end, unit = _ZERO, -1
    low, high = np.uint64(0), np.uint64(0)
    for r in range(len(lengths)):
        start, end = end, end + np.uint64(lengths[r])
        slot, before = size, np.int64(0)
        for i in range(start, end):
            column = np.int64(columns[i])
            gap = column - before
            before = column
            if slot == size or gap > max_gap:
                if unit >= 0:
                    units[unit, 0], units[unit, 1] = low, high
                unit += 1
                slot = 0
                low, high = np.uint64(column), np.uint64(0)
            else:
                low |= np.uint64(gap) << np.uint64(8 + 8 * slot)
            at = value_at + width * slot
            value = np.uint64(coded[i]) << np.uint64(at & 63)
            if at < 64:
                low |= value
            else:
                high |= value
            slot += 1
    if unit >= 0:
        units[unit, 0], units[unit, 1] = low, high


class Counted:
    """The entries of pieces whose rows do not overlap, counted, and what writes them.

    Attributes:
        pieces: those with entries, in the order of their rows.
        lengths, groups: int64 [rows], of the whole weight.
        largest: float32 [rows], the largest |value| of each; zero unless `ranged`.
        divisors: float32 [rows]: what int8 values are divided by; for the caller to set.
    """

    def __init__(self, shape: tuple[int, int], group_size: int, ranged: bool) -> None:
        self.pieces: list[Piece] = []
        self.lengths = np.zeros(shape[0], np.int64)
        self.groups = np.zeros(shape[0], np.int64)
        self.largest = np.zeros(shape[0], np.float32)
        self.divisors = np.ones(shape[0], np.float32)
        self._ranged = ranged
        self._width = shape[1]
        self._columns: list[NDArray[np.uint16]] = []
        self._size = group_size

    def add(self, piece: Piece) -> bool:
        """Count an element piece; False: a position is out of range or out of order."""
        positions = _array(piece.positions)
        if not len(positions):
            return True
        rows = _rows(piece)
        columns = np.empty(len(positions), np.uint16)
        self.pieces.append(piece)
        self._columns.append(columns)
        values = _array(piece.values) if self._ranged else np.empty(0, np.float32)
        made: bool = count(
            positions, values.view(np.uint32), self._width, self._size,
            layout.MAX_GAP, columns, self.lengths[rows], self.groups[rows],
            self.largest[rows].view(np.uint32),
        )  # fmt: skip
        return made

    def quantise(self, room: NDArray[np.uint8]) -> None:
        """Write the int8 values of all entries into `room`, one byte each."""
        end = 0
        for piece, columns in zip(self.pieces, self._columns, strict=True):
            start, end = end, end + len(columns)
            self._quantised(piece, room[start:end])

    def write(self, form: int, stored: torch.dtype, room: NDArray[np.uint8]) -> None:
        """Write the units of all entries into `room`.

        Args:
            form: of `layout`.
            stored: dtype of values that are not int8.
            room: uint8, exactly as large as the units.
        """
        end = 0
        for piece, columns in zip(self.pieces, self._columns, strict=True):
            rows = _rows(piece)
            grouped = form in (layout.GROUP, layout.GROUP8)
            units = int(self.groups[rows].sum()) if grouped else len(columns)
            start, end = end, end + units * layout.UNIT_BYTES[form]
            mine = room[start:end]
            if form == layout.SPLIT8:
                mine.view(np.uint16)[:] = columns
                continue
            coded = self._coded(piece, form, stored)
            if grouped:
                value_at = 48 if form == layout.GROUP else 64
                group(
                    columns, coded, self.lengths[rows], self._size, layout.MAX_GAP, value_at,
                    mine.view(np.uint64).reshape(-1, 2),
                )  # fmt: skip
            else:
                shift, unit = (32, np.uint64) if form == layout.PAIR else (16, np.uint32)
                join(columns, coded, shift, mine.view(unit))

    def _coded(self, piece: Piece, form: int, stored: torch.dtype) -> NDArray[Any]:
        """The bits of a piece's values."""
        if form == layout.GROUP8:
            coded = np.empty(piece.positions.shape, np.uint8)
            self._quantised(piece, coded)
            return coded
        if form == layout.PAIR:
            return _array(piece.values).view(np.uint32)
        # torch's own rounding, vectorised: nothing else could be as sure to round alike.
        return _array(piece.values.to(stored).view(torch.uint16))

    def _quantised(self, piece: Piece, coded: NDArray[np.uint8]) -> None:
        rows = _rows(piece)
        divisors = self.divisors[rows]
        quantise(_array(piece.values), self.lengths[rows], divisors, coded.view(np.int8))


def _rows(piece: Piece) -> slice:
    return slice(piece.row_offset, piece.row_offset + piece.rows)


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """Its memory, contiguous: the loops are compiled for that alone."""
    array: NDArray[Any] = tensor.contiguous().numpy()
    return array
