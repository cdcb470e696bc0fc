"""The memory layout of a packed delta, shared by the packers and the kernels that read it.

A packed delta is one byte buffer, so that it costs one allocation and travels as one copy. All of
an adapter's pieces on one patched weight are in it. Output rows are cut into *row blocks*, the same
for every adapter of a weight: threads own row blocks, so their outputs are disjoint and no atomics
are needed. The part of a piece that lies in a row block is a *segment*:

element (SELL-16, sorted): the rows that hold entries, sorted by their number of entries, longest
    first, in slices of 16; a slice is as long as its first row. Step k of a slice is 16 columns
    (uint16) and 16 values (float32), one lane a row. Neighbouring slices of equal length form a
    *run* (length, slices), so no per-slice pointer is kept. A lane shorter than its slice repeats
    its last column with value 0; lanes behind the last row write to a trash row. Costs 6 bytes an
    entry and 2 a non-empty row, plus padding (see `MAX_BLOCK_ROWS`).
block: the tiles of the piece in row-major order, every tile stored column by column, float32; the
    tile columns (int32) and a pointer per row of tiles (int32). A row of tiles that straddles a
    row block's border is listed in both segments and stored once.

Header, int64 words: MAGIC, rows, columns, rows of a row block, row blocks, segments, 0, 0; then
`row blocks + 1` starts into the list of segments; then the segments (`SEGMENT_WORDS` each).
All offsets are in bytes from the start of the buffer; values start at multiples of `ALIGN`.
"""

from __future__ import annotations

from typing import Final

#: First header word: the layout's name and version.
MAGIC: Final = 0x314C4C4553  # "SELL1"
HEADER_WORDS: Final = 8
SEGMENT_WORDS: Final = 10
#: Lanes of a slice: one AVX-512 vector of float32.
LANES: Final = 16
ALIGN: Final = 64
#: Columns are 16 bits wide.
MAX_COLUMNS: Final = 1 << 16
#: Row blocks are cut to at most this many rows: with 16 rows of a step their accumulators take
#: 32 KiB of the second-level cache, and sorting by length within 512 rows pads a random mask of
#: 10 / 1 / 0.05 % by 1 / 4 / 18 %, within 128 rows by 4 / 14 / 69 %.
MAX_BLOCK_ROWS: Final = 512
#: Weights of at least this many rows are cut into two row blocks, so that two threads can share
#: even one chunk of rows.
MIN_SPLIT_ROWS: Final = 128
#: Tile sides that the block kernels read directly; `pack` turns other tiles into elements.
TILE_SIDES: Final = (8, 16, 32, 48, 64)
#: Accumulator rows before and behind a row block: tiles that straddle its border write there, and
#: so do the lanes of a slice that have no row.
MARGIN: Final = 64

# Words of a segment.
(
    KIND,  # 0 for element, the side of a tile for block
    PROJECTION,
    RUNS,  # element: offset of int32 pairs (length, slices) | block: first row of tiles
    RUN_COUNT,  # element: number of runs | block: number of rows of tiles
    ROWS,  # element: offset of uint16 rows within the row block | block: of the tile pointers
    COLUMNS,  # offset of the columns: uint16 of entries | int32 of tiles
    VALUES,  # offset of the values
    STEPS,  # element: number of steps | block: number of tiles of the piece
    PIECE_ROW,  # first output row of the piece
    PIECE_ROWS,  # rows of the piece
) = range(SEGMENT_WORDS)


def block_rows(rows: int) -> int:
    """Rows of a row block for a weight of `rows` output rows, a multiple of `LANES`."""
    blocks = -(-rows // MAX_BLOCK_ROWS)
    if rows >= MIN_SPLIT_ROWS:
        blocks = max(blocks, 2)
    per_block = -(-rows // max(blocks, 1))
    return max(-(-per_block // LANES) * LANES, LANES)


def align(offset: int, to: int = ALIGN) -> int:
    """The next multiple of `to`."""
    return -(-offset // to) * to
