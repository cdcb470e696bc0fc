"""The packer for the Triton kernels: whole arrays at a time, in numpy, in a loader's thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.kernels.delta import Coding, Piece, as_elements
from gossamer.kernels.errors import PackError
from gossamer.kernels.gpu import layout
from gossamer.kernels.gpu.layout import GROUP, GROUP8, PAIR, SPLIT8, WORD
from gossamer.kernels.reference.packing import check_positions, count_entries

_STORED: dict[Coding, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.bfloat16,
}


@dataclass(frozen=True, eq=False, slots=True)
class _Rows:
    """Entries by output row: `starts` int64 [rows + 1], columns increasing within a row."""

    starts: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float32]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Entries of each row."""
        return np.diff(self.starts)


class _Writer:
    """Collects arrays with their offsets; `finish` lays them into one buffer."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, NDArray[Any]]] = []
        # Offset 0 says "absent".
        self.size = layout.ALIGN

    def put(self, array: NDArray[Any]) -> int:
        """The offset that the array will have."""
        offset = self.size
        self.parts.append((offset, array))
        self.size = layout.align(offset + array.nbytes)
        return offset

    def finish(self) -> Tensor:
        """The buffer."""
        buffer = torch.empty(self.size, dtype=torch.uint8)
        raw = buffer.numpy()
        end = 0
        for offset, array in self.parts:
            raw[end:offset] = 0
            end = offset + array.nbytes
            raw[offset:end] = array.reshape(-1).view(np.uint8)
        raw[end:] = 0
        return buffer


def pack(
    pieces: Sequence[Piece], shape: tuple[int, int], coding: Coding
) -> tuple[int, Tensor, tuple[int, ...]]:
    """See `gossamer.kernels.delta.pack`. Returns entries, buffer, record."""
    rows, columns = shape
    last = max((p.projection for p in pieces), default=0)
    if rows >= layout.MAX_ROWS or last >= layout.MAX_PROJECTIONS:
        limit = f"at most {layout.MAX_ROWS - 1} rows and {layout.MAX_PROJECTIONS} projections"
        raise PackError(0, None, f"{limit}, are {rows} and {last + 1}")
    for index, piece in enumerate(pieces):
        check_positions(index, piece, columns)
    count = sum(count_entries(piece, columns) for piece in pieces)
    writer = _Writer()
    record = [0] * layout.RECORD_WORDS
    record[layout.BOUNDARIES] = _boundaries(pieces, rows)
    tiles: list[Piece] = []
    others: list[Piece] = []
    for piece in pieces:
        whole = piece.kind == "block" and piece.row_offset % piece.block_size == 0
        (tiles if whole and piece.block_size in layout.TILE_SIDES else others).append(piece)
    for i, side in enumerate(layout.TILE_SIDES):
        chosen = [p for p in tiles if p.block_size == side and len(p.positions)]
        if chosen:
            parts = _tiles(writer, chosen, side, shape, coding)
            record[layout.BLOCKS + 3 * i : layout.BLOCKS + 3 * i + 3] = parts
    entries = _by_row([as_elements(p, columns, sides=()) for p in others], shape)
    if len(entries.columns):
        record[: layout.BLOCKS] = _element(writer, entries, rows, coding)
    return count, writer.finish(), tuple(record)


def _boundaries(pieces: Sequence[Piece], rows: int) -> int:
    """Where the projections begin, as one word.

    Raises:
        PackError: a projection's rows do not all lie before those of the next.
    """
    found, end, last = [rows] * (layout.MAX_PROJECTIONS - 1), 0, 0
    order = sorted(range(len(pieces)), key=lambda i: pieces[i].row_offset)
    for i in order:
        piece = pieces[i]
        if not len(piece.positions):
            continue
        if piece.projection < last or (piece.projection > last and piece.row_offset < end):
            raise PackError(i, None, f"rows of projection {piece.projection} among those of {last}")
        for p in range(last, piece.projection):
            found[p] = piece.row_offset
        last, end = piece.projection, max(end, piece.row_offset + piece.rows)
    return sum(row << (21 * i) for i, row in enumerate(found))


def _by_row(pieces: Sequence[Piece], shape: tuple[int, int]) -> _Rows:
    """Entries of all pieces; where pieces overlap, their sum in fp32 in the order of the pieces."""
    rows, columns = shape
    pieces = [p for p in pieces if len(p.positions)]
    flat = [p.positions.numpy() + p.row_offset * columns for p in pieces]
    positions = flat[0] if len(flat) == 1 else np.concatenate([*flat, np.empty(0, np.int64)])
    values = np.concatenate([*(p.values.numpy() for p in pieces), np.empty(0, np.float32)])
    ends = [(f[0], f[-1]) for f in flat]
    if any(following[0] <= before[1] for before, following in pairwise(ends)):
        positions, inverse = np.unique(positions, return_inverse=True)
        total = np.zeros(len(positions), np.float32)
        np.add.at(total, inverse, values)
        values = total
    starts = np.searchsorted(positions, np.arange(rows + 1) * columns)
    first = np.repeat(np.arange(rows) * columns, np.diff(starts))
    return _Rows(starts, positions - first, values)


def _element(writer: _Writer, entries: _Rows, rows: int, coding: Coding) -> list[int]:
    """Write the element part; returns its words of the record."""
    words = [0] * layout.BLOCKS
    scales: NDArray[np.uint16] | None = None
    if coding == "float32":
        words[layout.FORM] = PAIR
        bits = entries.values.view(np.uint32).astype(np.uint64)
        units: NDArray[Any] = entries.columns.astype(np.uint64) | bits << np.uint64(32)
        lengths = entries.lengths
    else:
        single, grouped = (SPLIT8, GROUP8) if coding == "int8" else (WORD, GROUP)
        group_of, slot_of, groups = _groups(entries, layout.UNIT_ENTRIES[grouped])
        single_bytes = 3 if coding == "int8" else layout.UNIT_BYTES[single]
        better = int(groups.sum()) * layout.UNIT_BYTES[grouped]
        form = grouped if better < single_bytes * len(entries.columns) else single
        words[layout.FORM] = form
        if coding == "int8":
            scales, coded = _quantised(entries, rows)
            if form == single:
                words[layout.VALUES8] = writer.put(coded)
        else:
            stored = torch.from_numpy(entries.values).to(_STORED[coding])
            coded = stored.view(torch.uint16).numpy()
        lengths = groups if form == grouped else entries.lengths
        if form == SPLIT8:
            units = entries.columns.astype(np.uint16)
        elif form == WORD:
            units = entries.columns.astype(np.uint32) | coded.astype(np.uint32) << np.uint32(16)
        else:
            units = _grouped(entries, group_of, slot_of, int(groups.sum()), coded)
    words[layout.UNITS] = writer.put(units)
    return _write_rows(writer, words, lengths, scales, rows)


def _write_rows(
    writer: _Writer,
    words: list[int],
    lengths: NDArray[np.int64],
    scales: NDArray[np.uint16] | None,
    rows: int,
) -> list[int]:
    """The per-row arrays."""
    per_row = np.zeros(layout.padded(rows), np.int64)
    per_row[:rows] = lengths
    starts = np.zeros(len(per_row) // layout.TILE_ROWS, np.int64)
    starts[1:] = np.cumsum(per_row.reshape(-1, layout.TILE_ROWS).sum(axis=1))[:-1]
    words[layout.STARTS] = writer.put(starts.astype(np.int32))
    words[layout.LENGTHS] = writer.put((per_row & 0xFF).astype(np.uint8))
    if per_row.max() > 0xFF:
        words[layout.HIGH] = writer.put((per_row >> 8).astype(np.uint8))
    if scales is not None:
        wide = np.zeros(len(per_row), np.uint16)
        wide[:rows] = scales
        words[layout.SCALES] = writer.put(wide)
    return words


def _groups(
    entries: _Rows, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Greedy groups: at most `size` entries of one row, no gap over `MAX_GAP` inside.

    Returns:
        per entry its group and its slot there, per row its number of groups.
    """
    count = len(entries.columns)
    breaks = np.ones(count + 1, bool)
    breaks[1:-1] = np.diff(entries.columns) > layout.MAX_GAP
    breaks[entries.starts] = True  # also the one behind the last entry
    runs = np.flatnonzero(breaks[:-1])
    run_lengths = np.diff(np.append(runs, count))
    slot = np.arange(count) - np.repeat(runs, run_lengths)
    slot %= size
    group = np.cumsum(slot == 0) - 1
    ends = np.append(group, group[-1] + 1 if count else 0)[entries.starts]
    return group, slot, np.diff(ends)


def _grouped(
    entries: _Rows,
    group: NDArray[np.int64],
    slot: NDArray[np.int64],
    groups: int,
    coded: NDArray[Any],
) -> NDArray[np.uint8]:
    """uint8 [groups, 16]: column (2 bytes), gaps, values, all little-endian."""
    units = np.zeros((groups, 16), np.uint8)
    head = slot == 0
    units[:, :2] = entries.columns[head].astype(np.uint16)[:, None].view(np.uint8)
    inner = np.flatnonzero(~head)
    units[group[inner], 1 + slot[inner]] = entries.columns[inner] - entries.columns[inner - 1]
    if coded.dtype == np.uint16:
        units.view(np.uint16)[group, 3 + slot] = coded
    else:
        units.view(np.int8)[group, 8 + slot] = coded
    return units


def _quantised(entries: _Rows, rows: int) -> tuple[NDArray[np.uint16], NDArray[np.int8]]:
    """bfloat16 scales per row (as their bits), and int8 values; |error| ≤ scale / 2."""
    lengths = entries.lengths
    largest = np.zeros(rows, np.float32)
    filled = np.flatnonzero(lengths)
    largest[filled] = np.maximum.reduceat(np.abs(entries.values), entries.starts[filled])
    scale = torch.from_numpy(largest / np.float32(127)).to(torch.bfloat16)
    # Rounded down, the largest value would not fit: one step up, which bfloat16's bits count.
    bits = scale.view(torch.int16).numpy().copy()
    bits += (scale.float().numpy() * np.float32(127) < largest).astype(np.int16)
    exact = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    divisor = np.repeat(np.where(exact > 0, exact, 1), lengths)
    return bits.view(np.uint16), np.rint(entries.values / divisor).astype(np.int8)


def _tiles(
    writer: _Writer, pieces: Sequence[Piece], side: int, shape: tuple[int, int], coding: Coding
) -> list[int]:
    """Write the tiles of one side; returns the offsets of values, pointers and columns."""
    across, down = -(-shape[1] // side), -(-shape[0] // side)
    positions = np.concatenate(
        [p.positions.numpy() + p.row_offset // side * across for p in pieces]
    )
    values = torch.cat([p.values for p in pieces])
    if (np.diff(positions) <= 0).any():  # pieces overlap, or are out of order: the sum
        positions, inverse = np.unique(positions, return_inverse=True)
        total = torch.zeros(len(positions), side, side)
        values = total.index_add_(0, torch.from_numpy(inverse), values)
    stored = values.to(_STORED[coding]).contiguous()
    pointers = np.searchsorted(positions, np.arange(down + 1) * across).astype(np.int32)
    return [
        writer.put(stored.view(torch.uint8).numpy()),
        writer.put(pointers),
        writer.put((positions % across).astype(np.uint16)),
    ]


def table(records: Sequence[tuple[tuple[int, ...], int] | None]) -> Tensor:
    """int64 [slots, RECORD_WORDS]: by slot a record with addresses, given record and address of
    the buffer; zeros for None."""
    words = np.zeros((len(records), layout.RECORD_WORDS), np.int64)
    for slot, found in enumerate(records):
        if found is not None:
            record, address = found
            words[slot] = record
            offsets = words[slot, layout.OFFSETS]
            words[slot, layout.OFFSETS] = np.where(offsets > 0, offsets + address, 0)
    return torch.from_numpy(words)


def sides(records: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Sides of the tiles that packed deltas have, from small to large."""
    return tuple(
        side
        for i, side in enumerate(layout.TILE_SIDES)
        if any(record[layout.BLOCKS + 3 * i] for record in records)
    )
