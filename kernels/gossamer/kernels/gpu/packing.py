"""The packer for the Triton kernels, in a loader's thread.

Entries are counted and written by compiled loops (`packing_loops`) where numba is installed. A box
that only serves need not have it: whole-array passes of numpy write the same bytes, five to fifty
times slower. They also add up pieces whose rows overlap.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.kernels.delta import Coding, Piece, as_elements
from gossamer.kernels.errors import PackError
from gossamer.kernels.gpu import layout
from gossamer.kernels.gpu.layout import GROUP, GROUP8, PAIR, SPLIT8, WORD
from gossamer.kernels.reference.packing import check_positions, count_entries

if TYPE_CHECKING:
    from gossamer.kernels.gpu.packing_loops import Counted

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
    """Collects parts with their offsets; `finish` lays them into one buffer."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, int, Callable[[NDArray[np.uint8]], None]]] = []
        # Offset 0 says "absent".
        self.size = layout.ALIGN

    def put(self, array: NDArray[Any]) -> int:
        """The offset that the array will have."""

        def copy(room: NDArray[np.uint8]) -> None:
            room[:] = array.reshape(-1).view(np.uint8)

        return self.reserve(array.nbytes, copy)

    def reserve(self, nbytes: int, write: Callable[[NDArray[np.uint8]], None]) -> int:
        """The offset of a part that `finish` has `write` fill, every byte of it."""
        offset = self.size
        self.parts.append((offset, nbytes, write))
        self.size = layout.align(offset + nbytes)
        return offset

    def finish(self) -> Tensor:
        """The buffer."""
        buffer = torch.empty(self.size, dtype=torch.uint8)
        raw = buffer.numpy()
        end = 0
        for offset, nbytes, write in self.parts:
            raw[end:offset] = 0
            end = offset + nbytes
            write(raw[offset:end])
        raw[end:] = 0
        return buffer


def pack(
    pieces: Sequence[Piece], shape: tuple[int, int], coding: Coding, loops: bool = True
) -> tuple[int, Tensor, tuple[int, ...]]:
    """See `gossamer.kernels.delta.pack`. Returns entries, buffer, record.

    `loops`: by the compiled loops where that is possible; False: by numpy alone.
    """
    rows, columns = shape
    last = max((p.projection for p in pieces), default=0)
    if rows >= layout.MAX_ROWS or last >= layout.MAX_PROJECTIONS:
        limit = f"at most {layout.MAX_ROWS - 1} rows and {layout.MAX_PROJECTIONS} projections"
        raise PackError(0, None, f"{limit}, are {rows} and {last + 1}")
    others = [p for p in pieces if not _is_tiled(p)]
    counted = _counted(others, shape, coding) if loops else None
    for index, piece in enumerate(pieces):
        if counted is None or piece.kind == "block":
            check_positions(index, piece, columns)
            if counted is not None and not _is_tiled(piece):
                counted.add(as_elements(piece, columns, sides=()))
        elif not counted.add(piece):
            check_positions(index, piece, columns)  # finds the position again, and says why
    count = sum(count_entries(piece, columns) for piece in pieces)
    writer = _Writer()
    record = [0] * layout.HOST_WORDS
    record[layout.BOUNDARIES] = _boundaries(pieces, rows)
    for i, side in enumerate(layout.TILE_SIDES):
        chosen = [p for p in pieces if _is_tiled(p) and p.block_size == side and len(p.positions)]
        if chosen:
            record[layout.COUNTS + 1 + i], *parts = _tiles(writer, chosen, side, shape, coding)
            record[layout.BLOCKS + 3 * i : layout.BLOCKS + 3 * i + 3] = parts
    if counted is not None:
        if counted.pieces:
            words, units = _counted_element(writer, counted, coding)
            record[: layout.BLOCKS], record[layout.COUNTS] = words, units
    else:
        entries = _by_row([as_elements(p, columns, sides=()) for p in others], shape)
        if len(entries.columns):
            words, units = _element(writer, entries, rows, coding)
            record[: layout.BLOCKS], record[layout.COUNTS] = words, units
    return count, writer.finish(), tuple(record)


def _is_tiled(piece: Piece) -> bool:
    """Whether its tiles are stored as such."""
    side = piece.block_size
    return piece.kind == "block" and side in layout.TILE_SIDES and piece.row_offset % side == 0


@functools.cache
def _compiled() -> Callable[[tuple[int, int], int, bool], Counted] | None:
    """`packing_loops.Counted`, where numba is installed."""
    if importlib.util.find_spec("numba") is None:
        return None
    loops = importlib.import_module("gossamer.kernels.gpu.packing_loops")
    made: Callable[[tuple[int, int], int, bool], Counted] = loops.Counted
    return made


def _counted(pieces: Sequence[Piece], shape: tuple[int, int], coding: Coding) -> Counted | None:
    """Room for the counts of the compiled loops; None: numpy must do."""
    made = _compiled()
    filled = [p for p in pieces if len(p.positions)]
    ends = [(p.row_offset, p.row_offset + p.rows) for p in filled]
    if made is None or any(following[0] < before[1] for before, following in pairwise(ends)):
        return None
    eight = coding == "int8"
    return made(shape, layout.UNIT_ENTRIES[GROUP8 if eight else GROUP], eight)


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
    return layout.boundaries(found)


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


def _form(coding: Coding, entries: int, groups: int) -> int:
    """The smallest form that a coding allows."""
    if coding == "float32":
        return PAIR
    single, grouped = (SPLIT8, GROUP8) if coding == "int8" else (WORD, GROUP)
    single_bytes = 3 if coding == "int8" else layout.UNIT_BYTES[single]
    return grouped if groups * layout.UNIT_BYTES[grouped] < single_bytes * entries else single


def _counted_element(writer: _Writer, counted: Counted, coding: Coding) -> tuple[list[int], int]:
    """`_element`, by the compiled loops."""
    words = [0] * layout.BLOCKS
    entries, groups = int(counted.lengths.sum()), int(counted.groups.sum())
    form = words[layout.FORM] = _form(coding, entries, groups)
    scales: NDArray[np.uint16] | None = None
    if coding == "int8":
        scales, divisors = _scales(counted.largest)
        counted.divisors = divisors
    if form == SPLIT8:
        words[layout.VALUES8] = writer.reserve(entries, counted.quantise)
    lengths = counted.groups if form in (GROUP, GROUP8) else counted.lengths
    words[layout.UNITS] = writer.reserve(
        int(lengths.sum()) * layout.UNIT_BYTES[form],
        lambda room: counted.write(form, _STORED[coding], room),
    )
    return _write_rows(writer, words, lengths, scales, len(lengths))


def _element(writer: _Writer, entries: _Rows, rows: int, coding: Coding) -> tuple[list[int], int]:
    """Write the element part; returns its words of the record, and its units."""
    words = [0] * layout.BLOCKS
    scales: NDArray[np.uint16] | None = None
    lengths = entries.lengths
    if coding == "float32":
        words[layout.FORM] = PAIR
        bits = entries.values.view(np.uint32).astype(np.uint64)
        units: NDArray[Any] = entries.columns.astype(np.uint64) | bits << np.uint64(32)
    else:
        size = layout.UNIT_ENTRIES[GROUP8 if coding == "int8" else GROUP]
        group_of, slot_of, groups = _groups(entries, size)
        form = words[layout.FORM] = _form(coding, len(entries.columns), int(groups.sum()))
        if coding == "int8":
            scales, coded = _quantised(entries, rows)
            if form == SPLIT8:
                words[layout.VALUES8] = writer.put(coded)
        else:
            stored = torch.from_numpy(entries.values).to(_STORED[coding])
            coded = stored.view(torch.uint16).numpy()
        if form == SPLIT8:
            units = entries.columns.astype(np.uint16)
        elif form == WORD:
            units = entries.columns.astype(np.uint32) | coded.astype(np.uint32) << np.uint32(16)
        else:
            lengths = groups
            units = _grouped(entries, group_of, slot_of, int(groups.sum()), coded)
    words[layout.UNITS] = writer.put(units)
    return _write_rows(writer, words, lengths, scales, rows)


def _write_rows(
    writer: _Writer,
    words: list[int],
    lengths: NDArray[np.int64],
    scales: NDArray[np.uint16] | None,
    rows: int,
) -> tuple[list[int], int]:
    """The per-row arrays; returns all words, and the units."""
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
    return words, int(per_row.sum())


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
    bits, divisors = _scales(largest)
    return bits, np.rint(entries.values / np.repeat(divisors, lengths)).astype(np.int8)


def _scales(largest: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """By row: the bits of its bfloat16 scale, and what to divide by; from its largest |value|."""
    scale = torch.from_numpy(largest / np.float32(127)).to(torch.bfloat16)
    # Rounded down, the largest value would not fit: one step up, which bfloat16's bits count.
    bits = scale.view(torch.int16).numpy().copy()
    bits += (scale.float().numpy() * np.float32(127) < largest).astype(np.int16)
    exact = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    return bits.view(np.uint16), np.where(exact > 0, exact, np.float32(1))


def _tiles(
    writer: _Writer, pieces: Sequence[Piece], side: int, shape: tuple[int, int], coding: Coding
) -> list[int]:
    """Write the tiles of one side; returns their number, and the offsets of values, pointers and
    columns."""
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
        len(positions),
        writer.put(stored.view(torch.uint8).numpy()),
        writer.put(pointers),
        writer.put((positions % across).astype(np.uint16)),
    ]


def table(records: Sequence[tuple[tuple[int, ...], int] | None]) -> Tensor:
    """int64 [slots, RECORD_WORDS]: by slot a record with addresses, given record and address of
    the buffer; zeros for None."""
    nothing = (0,) * layout.RECORD_WORDS, 0
    found = [known or nothing for known in records]
    rows = [record[: layout.RECORD_WORDS] for record, _ in found]
    words = np.array(rows, np.int64).reshape(-1, layout.RECORD_WORDS)
    addresses = np.array([address for _, address in found], np.int64)
    offsets = words[:, layout.OFFSETS.start : layout.OFFSETS.stop]
    offsets += np.where(offsets > 0, addresses[:, None], 0)
    return torch.from_numpy(words)


def sides(records: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Sides of the tiles that packed deltas have, from small to large."""
    return tuple(
        side
        for i, side in enumerate(layout.TILE_SIDES)
        if any(record[layout.BLOCKS + 3 * i] for record in records)
    )


def warm_up() -> None:
    """Compiles the loops, where numba is, by packing a thin and a thick piece in every coding."""
    for count, width in ((1, 4096), (20, 20)):
        piece = Piece("element", 0, 0, 1, 1, torch.arange(count), torch.ones(count))
        for coding in get_args(Coding):
            pack([piece], (1, width), coding)
