"""The memory layout of a packed delta for the Triton kernels.

A packed delta is one byte buffer, so that it costs one allocation and travels as one copy. Beside
it the host keeps a *record*: a few words that say where its parts lie. Binding puts the records of
all residents, with addresses in place of offsets, into one table on the device, which saves every
program one dependent load.

element (CSR per tile of rows): the output rows in their natural order, so that a program's rows are
    the same for every adapter and several members add up in registers. A row's entries are coded
    in *units*, which the four lanes of a row read side by side; rows follow each other without
    gaps. Per `TILE_ROWS` rows the index of the first unit (int32), per row the number of its units
    (uint8, and a second plane for its high byte when a row of the delta has more than 255).

    form     unit                                                          bytes an entry
    PAIR     64 bits: column, float32 value                                8
    WORD     32 bits: column (16), 16-bit value (16)                       4
    GROUP    128 bits: column, 4 gaps (8 each), 5 16-bit values            3.2 + rounding
    SPLIT8   16 bits: column; int8 values in an array of their own         3
    GROUP8   128 bits: column, 6 gaps (8 each), 7 int8 values              2.29 + rounding

    A group is closed early where the next gap is over 255; the slots behind repeat the last column
    (gap 0) with value 0. The int8 forms have a bfloat16 scale per row. `pack` takes the smallest
    form that a coding allows.

block: per side the tiles of the weight's own grid in row-major order, each row by row, in the
    coding's type (float32 values where the coding is int8 are bfloat16: a tile has no index to
    save); a pointer per row of tiles (int32), the column of each tile (uint16).

All offsets are in bytes from the start of the buffer, multiples of `ALIGN`; 0 is "absent".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

#: Rows that share one start: 0.125 bytes a row.
TILE_ROWS: Final = 32
#: Rows to which the per-row arrays are padded: the most that a program reads at once.
PADDED_ROWS: Final = 128
#: Lanes that read a row's units side by side. Part of the order of summation.
LANES: Final = 4
ALIGN: Final = 128
MAX_COLUMNS: Final = 1 << 16
#: Bits of a row's number where several share a word.
ROW_BITS: Final = 21
MAX_ROWS: Final = 1 << ROW_BITS
MAX_PROJECTIONS: Final = 4
#: Tile sides that have a kernel; `pack` turns other tiles into entries, and tiles of a piece that
#: does not begin at a multiple of their side.
TILE_SIDES: Final = (8, 16, 32)

# Forms.
PAIR, WORD, GROUP, SPLIT8, GROUP8 = range(5)
UNIT_BYTES: Final = (8, 4, 16, 2, 16)
#: Entries of a full unit.
UNIT_ENTRIES: Final = (1, 1, 5, 1, 7)
MAX_GAP: Final = 255

# Words of a record.
(
    FORM,
    STARTS,  # int32 per TILE_ROWS rows: index of their first unit
    LENGTHS,  # uint8 per row: its units, low byte
    HIGH,  # uint8 per row: high byte, or absent
    UNITS,  # absent: no entries
    SCALES,  # int8 forms: bfloat16 per row
    VALUES8,  # SPLIT8: int8 per entry
    BLOCKS,  # then for each side: values, pointers, columns
) = range(8)
RECORD_WORDS: Final = 17
#: First output rows of the projections 1, 2 and 3, `ROW_BITS` each.
BOUNDARIES: Final = RECORD_WORDS - 1
#: Behind what a table holds, for the host: the number of units, then of tiles by side.
COUNTS: Final = RECORD_WORDS
HOST_WORDS: Final = COUNTS + 1 + len(TILE_SIDES)
#: Words that are offsets in a record and addresses in a table.
OFFSETS: Final = range(STARTS, BOUNDARIES)


def align(offset: int) -> int:
    """The next multiple of `ALIGN`."""
    return -(-offset // ALIGN) * ALIGN


def boundaries(first_rows: Sequence[int]) -> int:
    """The word `BOUNDARIES`, from where the projections 1, 2 and 3 begin."""
    return sum(row << (ROW_BITS * i) for i, row in enumerate(first_rows))


def projection_of(word: int, rows: Tensor) -> Tensor:
    """The projection that each output row belongs to, int64; `word`: `BOUNDARIES`."""
    projection = torch.zeros_like(rows)
    for i in range(MAX_PROJECTIONS - 1):
        projection += rows >= (word >> (ROW_BITS * i) & (MAX_ROWS - 1))
    return projection


def padded(rows: int) -> int:
    """Length of the per-row arrays."""
    return -(-rows // PADDED_ROWS) * PADDED_ROWS
