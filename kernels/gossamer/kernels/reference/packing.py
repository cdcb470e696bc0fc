"""What the packed layout is, in numpy: a packer that writes it and a reader that takes it apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.kernels import layout
from gossamer.kernels.delta import PackedDelta, Piece, as_elements
from gossamer.kernels.errors import PackError
from gossamer.kernels.layout import HEADER_WORDS, LANES, SEGMENT_WORDS, align


@dataclass(frozen=True, eq=False, slots=True)
class _Slices:
    """A segment of an element piece: offsets of its parts follow from these arrays."""

    runs: NDArray[np.int32]
    rows: NDArray[np.uint16]
    columns: NDArray[np.uint16]
    values: NDArray[np.float32]


def check_positions(index: int, piece: Piece, in_features: int) -> None:
    """Order, range and ragged edges of one piece.

    Raises:
        PackError: for the first position at fault.
    """
    positions = piece.positions.numpy()
    side = 1 if piece.kind == "element" else piece.block_size
    across, down = -(-in_features // side), -(-piece.rows // side)
    limit = across * down
    outside = (positions < 0) | (positions >= limit)
    outside[1:] |= positions[1:] <= positions[:-1]
    if outside.any():
        at = int(outside.argmax())
        raise PackError(index, at, _misplaced(positions, at, limit))
    if piece.kind == "block":
        inner = np.arange(side)
        over = (positions // across * side)[:, None, None] + inner[:, None] >= piece.rows
        over = over | ((positions % across * side)[:, None, None] + inner >= in_features)
        stray = (over & (piece.values.numpy() != 0)).any(axis=(1, 2))
        if stray.any():
            raise PackError(index, int(stray.argmax()), STRAY)


STRAY = "the tile has values outside its piece"


def _misplaced(positions: NDArray[np.int64], at: int, limit: int) -> str:
    value = int(positions[at])
    if not 0 <= value < limit:
        return f"{value} is outside [0, {limit})"
    return f"{value} follows {int(positions[at - 1])}; positions must strictly increase"


def pack(pieces: Sequence[Piece], shape: tuple[int, int]) -> tuple[int, Tensor]:
    """See `gossamer.kernels.delta.pack`."""
    for index, piece in enumerate(pieces):
        check_positions(index, piece, shape[1])
    counts = sum(count_entries(piece, shape[1]) for piece in pieces)
    pieces = [as_elements(piece, shape[1]) for piece in pieces]
    per_block = layout.block_rows(shape[0])
    blocks = -(-shape[0] // per_block)
    # The tiles of a block piece are stored once, with its first segment.
    writer = _Writer()
    segments: list[list[int]] = []
    starts = [0]
    stored: dict[int, tuple[int, int, int]] = {}
    plan = [
        (block, i)
        for block in range(blocks)
        for i, piece in enumerate(pieces)
        if len(piece.positions) and _overlaps(piece, block * per_block, per_block)
    ]
    head = 8 * (HEADER_WORDS + blocks + 1 + SEGMENT_WORDS * len(plan))
    writer.size = align(head)
    for block in range(blocks):
        for i in (i for b, i in plan if b == block):
            piece, first = pieces[i], block * per_block
            if piece.kind == "element":
                words = writer.element(_slices(piece, shape[1], first, per_block))
            else:
                if i not in stored:
                    stored[i] = writer.tiles(piece, shape[1])
                words = _tile_rows(piece, first, per_block, stored[i])
            words[layout.PROJECTION] = piece.projection
            words[layout.PIECE_ROW], words[layout.PIECE_ROWS] = piece.row_offset, piece.rows
            segments.append(words)
        starts.append(len(segments))
    header = [layout.MAGIC, *shape, per_block, blocks, len(segments), 0, 0, *starts]
    header += [word for words in segments for word in words]
    writer.parts.append((0, np.array(header, dtype=np.int64)))
    return counts, writer.finish()


def count_entries(piece: Piece, in_features: int) -> int:
    """Entries of a piece, tiles clipped at its edges."""
    if piece.kind == "element":
        return len(piece.positions)
    side, positions = piece.block_size, piece.positions.numpy()
    across = -(-in_features // side)
    tall = np.minimum(piece.rows - positions // across * side, side)
    return int((tall * np.minimum(in_features - positions % across * side, side)).sum())


def _overlaps(piece: Piece, first: int, count: int) -> bool:
    return piece.row_offset < first + count and first < piece.row_offset + piece.rows


class _Writer:
    """Collects arrays with their offsets; `finish` lays them into one buffer."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, NDArray[Any]]] = []
        self.size = 0

    def put(self, array: NDArray[Any], alignment: int) -> int:
        offset = align(self.size, alignment)
        self.parts.append((offset, array))
        self.size = offset + array.nbytes
        return offset

    def element(self, slices: _Slices) -> list[int]:
        words = [0] * SEGMENT_WORDS
        words[layout.RUN_COUNT] = len(slices.runs)
        words[layout.STEPS] = len(slices.values) // LANES
        words[layout.RUNS] = self.put(slices.runs, 8)
        words[layout.ROWS] = self.put(slices.rows, 8)
        words[layout.COLUMNS] = self.put(slices.columns, 8)
        words[layout.VALUES] = self.put(slices.values, layout.ALIGN)
        return words

    def tiles(self, piece: Piece, in_features: int) -> tuple[int, int, int]:
        """Offsets of a block piece's pointers, columns and values."""
        side, positions = piece.block_size, piece.positions.numpy()
        across, down = -(-in_features // side), -(-piece.rows // side)
        pointers = np.searchsorted(positions, np.arange(down + 1) * across).astype(np.int32)
        return (
            self.put(pointers, 8),
            self.put((positions % across).astype(np.int32), 8),
            self.put(piece.values.numpy().transpose(0, 2, 1).copy(), layout.ALIGN),
        )

    def finish(self) -> Tensor:
        buffer = torch.zeros(align(self.size), dtype=torch.uint8)
        raw = buffer.numpy()
        for offset, array in self.parts:
            raw[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        return buffer


def _tile_rows(piece: Piece, first: int, count: int, offsets: tuple[int, int, int]) -> list[int]:
    """The segment of a block piece: the rows of tiles that reach into a row block."""
    side = piece.block_size
    low = max(first - piece.row_offset, 0) // side
    high = -(-min(first + count - piece.row_offset, piece.rows) // side)
    words = [0] * SEGMENT_WORDS
    words[layout.KIND], words[layout.RUNS], words[layout.RUN_COUNT] = side, low, high - low
    words[layout.ROWS], words[layout.COLUMNS], words[layout.VALUES] = offsets
    words[layout.STEPS] = len(piece.positions)
    return words


def _slices(piece: Piece, in_features: int, first: int, count: int) -> _Slices:
    """The entries of an element piece inside one row block, as sorted slices."""
    low = max(first - piece.row_offset, 0)
    high = min(first + count - piece.row_offset, piece.rows)
    positions = piece.positions.numpy()
    span = slice(*np.searchsorted(positions, [low * in_features, high * in_features]))
    row = positions[span] // in_features - low
    lengths = np.bincount(row, minlength=high - low)
    order = np.argsort(-lengths, kind="stable")[: int((lengths > 0).sum())]
    slices = -(-len(order) // LANES)
    slice_length = lengths[order[::LANES]]
    starts = np.concatenate(([0], np.cumsum(slice_length))) * LANES
    base = np.empty(high - low, np.int64)
    base[order] = starts[np.arange(len(order)) // LANES] + np.arange(len(order)) % LANES
    k = np.arange(len(row)) - np.searchsorted(row, row)
    columns = np.zeros(int(starts[-1]), np.uint16)
    values = np.zeros(int(starts[-1]), np.float32)
    columns[base[row] + k * LANES] = positions[span] % in_features
    values[base[row] + k * LANES] = piece.values.numpy()[span]
    for rank, r in enumerate(order):  # a lane that ends early repeats its last column
        end, stop = base[r] + lengths[r] * LANES, starts[rank // LANES + 1]
        columns[end:stop:LANES] = columns[end - LANES]
    rows = np.full(slices * LANES, count, np.uint16)  # the trash row
    rows[: len(order)] = order + (piece.row_offset + low - first)
    run_length, run_slices = np.unique(-slice_length, return_counts=True)
    runs = np.stack((-run_length, run_slices), axis=1).astype(np.int32)
    return _Slices(runs, rows, columns, values)


def entries(packed: PackedDelta) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """See `gossamer.kernels.delta.entries`."""
    return list(_entries(packed.data.numpy()))


def _entries(data: NDArray[np.uint8]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    words = data[: len(data) // 8 * 8].view(np.int64)
    _, out_features, in_features, per_block, blocks, count = words[:6].tolist()
    starts = words[HEADER_WORDS : HEADER_WORDS + blocks + 1]
    first = HEADER_WORDS + blocks + 1
    segments = words[first : first + count * SEGMENT_WORDS].reshape(count, SEGMENT_WORDS)
    for block in range(blocks):
        low, high = block * per_block, min((block + 1) * per_block, out_features)
        for segment in segments[starts[block] : starts[block + 1]].tolist():
            if segment[layout.KIND]:
                row, column, value = _read_tiles(data, segment, in_features)
            else:
                row, column, value = _read_slices(data, segment)
                row = row + low
            inside = (row >= low) & (row < high)
            yield (
                segment[layout.PROJECTION],
                torch.from_numpy(row[inside]),
                torch.from_numpy(column[inside]),
                torch.from_numpy(value[inside]),
            )


def _view(data: NDArray[np.uint8], offset: int, count: int, dtype: type) -> NDArray[Any]:
    return data[offset : offset + count * np.dtype(dtype).itemsize].view(dtype)


def _read_slices(
    data: NDArray[np.uint8], segment: list[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Rows (within the row block), columns and values of an element segment, without padding."""
    runs = _view(data, segment[layout.RUNS], 2 * segment[layout.RUN_COUNT], np.int32).reshape(-1, 2)
    lengths = np.repeat(runs[:, 0], runs[:, 1])
    rows = _view(data, segment[layout.ROWS], len(lengths) * LANES, np.uint16).astype(np.int64)
    size = segment[layout.STEPS] * LANES
    columns = _view(data, segment[layout.COLUMNS], size, np.uint16).astype(np.int64)
    columns = columns.reshape(-1, LANES)
    values = _view(data, segment[layout.VALUES], size, np.float32).reshape(-1, LANES)
    first = np.zeros(len(columns), bool)
    first[np.cumsum(lengths) - lengths] = True
    # Columns rise within a lane; one that does not is padding.
    real = np.ones(columns.shape, bool)
    real[1:] = first[1:, None] | (columns[1:] > columns[:-1])
    row = np.repeat(rows.reshape(-1, LANES), lengths, axis=0)
    return row[real], columns[real], values[real]


def _read_tiles(
    data: NDArray[np.uint8], segment: list[int], in_features: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Absolute rows, columns and values of a block segment, clipped to its piece."""
    side, low = segment[layout.KIND], segment[layout.RUNS]
    down = -(-segment[layout.PIECE_ROWS] // side)
    pointers = _view(data, segment[layout.ROWS], down + 1, np.int32)
    span = slice(pointers[low], pointers[low + segment[layout.RUN_COUNT]])
    tiles = segment[layout.STEPS]
    tile_row = np.repeat(np.arange(down), np.diff(pointers))[span]
    tile_column = _view(data, segment[layout.COLUMNS], tiles, np.int32)[span]
    values = _view(data, segment[layout.VALUES], tiles * side * side, np.float32)
    values = values.reshape(-1, side, side)[span].transpose(0, 2, 1)
    inner = np.arange(side)
    row, column = np.broadcast_arrays(
        (tile_row * side)[:, None, None] + inner[:, None],
        (tile_column.astype(np.int64) * side)[:, None, None] + inner,
    )
    inside = (row < segment[layout.PIECE_ROWS]) & (column < in_features)
    return row[inside] + segment[layout.PIECE_ROW], column[inside], values[inside]
