"""Writing sparse deltas into dense matrices on a device, and taking them out again.

A job is one delta on one matrix; one launch does many, a program for each block of rows of each.
A delta has every position once, so its programs never meet. Where several deltas overlap, their sum
is taken in a float32 copy of the matrix and written back to the touched positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.delta import PackedDelta
from gossamer.kernels.gpu import layout
from gossamer.kernels.gpu.launch import require
from gossamer.kernels.gpu.packing import table
from gossamer.kernels.gpu.reading import (
    BLOCKS,
    BOUNDARIES,
    FORM,
    GROUP,
    LANES,
    PAIR,
    SCALES,
    SPLIT8,
    UNITS,
    VALUES8,
    WORD,
    group_gap,
    group_value,
    load_group,
    part_of,
    projection_of,
    row_units,
    spread,
    value_of,
)
from gossamer.kernels.gpu.variant import Variant, options

#: What happens at each position: the old entry is saved, the delta is added, the old entry comes
#: back, or the entry becomes the rounded one of a float32 copy.
Action = Literal["fuse", "save", "add", "restore", "round"]

#: Rows of a program; also the most tiles' rows, of 32.
ROWS = 128
#: Words of a job: address of the matrix, of the copy or the saved entries, of the factors; strides
#: of a row and a column; rows and columns of the matrix; stride of the factors' projections.
JOB_WORDS = 8
#: Saved entries for each 128-bit unit.
SLOTS = tl.constexpr(7)
MAX_PROJECTIONS = tl.constexpr(layout.MAX_PROJECTIONS)
RECORD_WORDS = tl.constexpr(layout.RECORD_WORDS)


@triton.jit
def _exchange(matrix, at, kept, index, value, live, ACTION: tl.constexpr):
    """One action at matrix[at]; what is saved goes to kept[index]."""
    if ACTION == "restore":
        tl.store(matrix + at, tl.load(kept + index, mask=live), mask=live)
    elif ACTION == "round":
        copy = kept.to(tl.pointer_type(tl.float32))
        total = tl.load(copy + at, mask=live)
        tl.store(matrix + at, total.to(matrix.dtype.element_ty), mask=live)
    else:
        old = tl.load(matrix + at, mask=live)
        if ACTION != "add":
            tl.store(kept + index, old, mask=live)
        if ACTION != "save":
            new = old.to(tl.float32) + value
            tl.store(matrix + at, new.to(matrix.dtype.element_ty), mask=live)


@triton.jit
def _factor(factors, projection_stride, boundaries, rows):
    """The member's weight for each row."""
    projection = projection_of(boundaries, rows, MAX_PROJECTIONS)
    return tl.load(factors + projection * projection_stride)


@triton.jit
def _singles(
    record, matrix, kept, base, column_stride, factor, scale, here, live,
    FORM: tl.constexpr, ACTION: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Units of one entry."""
    if FORM == SPLIT8:
        short = tl.load(part_of(record, UNITS, tl.uint16) + here, mask=live, other=0)
        column = short.to(tl.int32)
        value = tl.load(part_of(record, VALUES8, tl.int8) + here, mask=live, other=0)
        exact = value.to(tl.float32) * scale
    elif FORM == PAIR:
        unit = tl.load(part_of(record, UNITS, tl.int64) + here, mask=live, other=0)
        column = (unit & 0xFFFF).to(tl.int32)
        exact = (unit >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        word = tl.load(part_of(record, UNITS, tl.int32) + here, mask=live, other=0)
        column = word & 0xFFFF
        exact = value_of(word >> 16, HALF)
    to = base + column * column_stride
    _exchange(matrix, to, kept, here, factor * exact, live, ACTION)


@triton.jit
def _group(
    record, matrix, kept, base, column_stride, factor, scale, here, live,
    EIGHT: tl.constexpr, ACTION: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Units of several entries."""
    low, high = load_group(part_of(record, UNITS, tl.int64), here, live)
    column = (low & 0xFFFF).to(tl.int32)
    for slot in tl.static_range(7 if EIGHT else 5):
        real = live
        if slot > 0:
            gap = group_gap(low, slot)
            column += gap
            real = live & (gap != 0)
        value = factor * (group_value(low, high, slot, EIGHT, HALF) * scale)
        to = base + column * column_stride
        _exchange(matrix, to, kept, SLOTS * here + slot, value, real, ACTION)


@triton.jit
def _entries(
    record, matrix, kept, base, column_stride, factor, scale, at, end, steps,
    ACTION: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All units of a block of rows; base: where each lane's row of the matrix begins."""
    form = tl.load(record + FORM)
    wanted = factor != 0
    for k in range(steps):
        here = at + k * LANES
        live = (here < end) & wanted
        if form == PAIR:
            _singles(record, matrix, kept, base, column_stride, factor, scale, here, live,
                     PAIR, ACTION, HALF)  # fmt: skip
        elif form == WORD:
            _singles(record, matrix, kept, base, column_stride, factor, scale, here, live,
                     WORD, ACTION, HALF)  # fmt: skip
        elif form == SPLIT8:
            _singles(record, matrix, kept, base, column_stride, factor, scale, here, live,
                     SPLIT8, ACTION, HALF)  # fmt: skip
        elif form == GROUP:
            _group(record, matrix, kept, base, column_stride, factor, scale, here, live,
                   False, ACTION, HALF)  # fmt: skip
        else:
            _group(record, matrix, kept, base, column_stride, factor, scale, here, live,
                   True, ACTION, HALF)  # fmt: skip


@triton.jit
def _tiles(
    record, matrix, kept, row_stride, column_stride, factors, factor_stride, boundaries, begin,
    outputs, columns, PART: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
    VALUE: tl.constexpr, ACTION: tl.constexpr,
):  # fmt: skip
    """All tiles of one side in a block of rows; zeros in them are left out."""
    values = part_of(record, PART, VALUE)
    pointers = part_of(record, PART + 1, tl.int32)
    tile_columns = part_of(record, PART + 2, tl.uint16)
    first_row = begin // SIDE
    for down in range(first_row, tl.minimum(first_row + ROWS // SIDE, tl.cdiv(outputs, SIDE))):
        rows = down * SIDE + tl.arange(0, SIDE)
        factor = _factor(factors, factor_stride, boundaries, rows)
        for tile in range(tl.load(pointers + down), tl.load(pointers + down + 1)):
            inner = tl.arange(0, SIDE)
            column = tl.load(tile_columns + tile).to(tl.int32) * SIDE + inner
            index = tile * (SIDE * SIDE) + inner[:, None] * SIDE + inner[None, :]
            value = tl.load(values + index).to(tl.float32)
            inside = (rows < outputs)[:, None] & (column < columns)[None, :]
            live = inside & (value != 0) & (factor != 0)[:, None]
            to = rows[:, None].to(tl.int64) * row_stride + column[None, :] * column_stride
            _exchange(matrix, to, kept, index, factor[:, None] * value, live, ACTION)


@triton.jit
def _scatter(
    jobs, table, ROWS: tl.constexpr, JOB_WORDS: tl.constexpr, TYPE: tl.constexpr,
    VALUE: tl.constexpr, ACTION: tl.constexpr, SIDES: tl.constexpr,
):  # fmt: skip
    """Semantics: for every job, its `ACTION` at every position of its delta.

    "fuse": kept = W, W = round(W + factor · Δ); "add": the same without keeping; "save": kept = W;
    "restore": W = kept; "round": W = round(kept), kept being a float32 matrix of W's strides.
    Positions whose factor is 0 are left out. A program does `ROWS` rows of one job. SIDES 0 does
    the entries, else the tiles of that side.
    """
    begin = tl.program_id(0) * ROWS
    job = jobs + JOB_WORDS * tl.program_id(1)
    record = table + RECORD_WORDS * tl.program_id(1)
    outputs = tl.load(job + 5).to(tl.int32)
    matrix = tl.load(job).to(tl.pointer_type(TYPE))
    kept = tl.load(job + 1).to(tl.pointer_type(TYPE))
    factors = tl.load(job + 2).to(tl.pointer_type(tl.float32))
    row_stride, column_stride = tl.load(job + 3), tl.load(job + 4)
    factor_stride, boundaries = tl.load(job + 7), tl.load(record + BOUNDARIES)
    HALF: tl.constexpr = tl.float16 == VALUE
    if begin < outputs:
        if SIDES == 0:
            if tl.load(record + UNITS) != 0:
                rows = begin + tl.arange(0, ROWS)
                first, length = row_units(record, rows, ROWS)
                steps = tl.cdiv(tl.max(length, axis=0), LANES)
                lane = tl.broadcast_to(tl.arange(0, LANES)[None, :], [ROWS, LANES])
                at = spread(first, ROWS) + tl.reshape(lane, [ROWS * LANES])
                scale = tl.full([ROWS * LANES], 1.0, tl.float32)
                if tl.load(record + SCALES) != 0:
                    scales = part_of(record, SCALES, tl.bfloat16)
                    scale = spread(tl.load(scales + rows).to(tl.float32), ROWS)
                factor = spread(_factor(factors, factor_stride, boundaries, rows), ROWS)
                base = spread(rows, ROWS).to(tl.int64) * row_stride
                _entries(
                    record, matrix, kept, base, column_stride, factor, scale, at,
                    spread(first + length, ROWS), steps, ACTION, HALF,
                )  # fmt: skip
        else:
            PART: tl.constexpr = BLOCKS + (0 if SIDES == 8 else 3 if SIDES == 16 else 6)
            if tl.load(record + PART) != 0:
                _tiles(
                    record, matrix, kept, row_stride, column_stride, factors, factor_stride,
                    boundaries, begin, outputs, tl.load(job + 6).to(tl.int32),
                    PART, SIDES, ROWS, VALUE, ACTION,
                )  # fmt: skip


@dataclass(frozen=True, eq=False, slots=True)
class Job:
    """One delta to be written into one matrix.

    Attributes:
        matrix: (out, in), any strides.
        delta: packed for its shape, on its device.
        factors: float32 [projections or 1], contiguous, on its device.
        kept: room for its old entries, `room_for` many of the matrix's dtype.
        total: for "round", the float32 matrix, of the strides of `matrix`.
    """

    matrix: Tensor
    delta: PackedDelta
    factors: Tensor
    kept: Tensor | None = None
    total: Tensor | None = None


class Jobs:
    """Many deltas on many matrices, listed once on their device and run again and again.

    The matrices have one dtype, and so have the deltas' codings.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._held = tuple(jobs)  # by address alone they would not be
        matrix, coding = jobs[0].matrix, jobs[0].delta.coding
        self._constants = {"TYPE": _TYPES[matrix.dtype], "VALUE": _VALUES[coding], **options()}
        self._blocks = -(-max(job.matrix.shape[0] for job in jobs) // ROWS)
        found = [(job.delta.record, job.delta.data.data_ptr()) for job in jobs]
        self._records = table(found).to(matrix.device, non_blocking=True)
        words = np.array([_words(job) for job in jobs], np.int64)
        # Of the old entries those of the entries lie in front, then those of the tiles by side.
        skipped = np.cumsum([[0, *_room(job.delta)[:-1]] for job in jobs], axis=1)
        skipped *= np.array([[0 if job.kept is None else job.kept.itemsize] for job in jobs])
        self._saved: set[int] = set()
        self._words: dict[int, Tensor] = {}
        for part, side in enumerate((0, *layout.TILE_SIDES)):
            if any(job.delta.record[layout.COUNTS + part] for job in jobs):
                mine = words.copy()
                mine[:, 1] += skipped[:, part]
                self._words[side] = torch.from_numpy(mine).to(matrix.device, non_blocking=True)

    def run(self, action: Action) -> None:
        """One launch for the entries of all jobs, and one for each side of tiles that there is.

        "restore" leaves out what was never saved.
        """
        for side, words in self._words.items():
            if action == "restore" and side not in self._saved:
                continue
            _scatter[(self._blocks, len(words))](
                words, self._records, ROWS=ROWS, JOB_WORDS=JOB_WORDS, ACTION=action, SIDES=side,
                **self._constants,
            )  # fmt: skip
            if action in ("fuse", "save"):
                self._saved.add(side)


def _words(job: Job) -> list[int]:
    beside = job.kept if job.total is None else job.total
    return [
        job.matrix.data_ptr(), 0 if beside is None else beside.data_ptr(), job.factors.data_ptr(),
        *job.matrix.stride(), *job.matrix.shape, 1 if len(job.factors) > 1 else 0,
    ]  # fmt: skip


def _room(delta: PackedDelta) -> list[int]:
    """Places for the old entries of the entries, and of the tiles by side."""
    units, *tiles = delta.record[layout.COUNTS :]
    in_groups = layout.UNIT_BYTES[delta.record[layout.FORM]] == 16
    sides = zip(tiles, layout.TILE_SIDES, strict=True)
    return [units * (SLOTS.value if in_groups else 1), *(n * side * side for n, side in sides)]


def room_for(delta: PackedDelta) -> int:
    """Places that its old entries take."""
    return sum(_room(delta))


def dense(delta: PackedDelta, dtype: torch.dtype) -> Tensor:
    """Δ alone, [out, in]: exact where the dtype holds the delta's coding."""
    device = delta.data.device
    matrix = torch.zeros(delta.shape, dtype=dtype, device=device)
    require("delta", matrix)
    Jobs([Job(matrix, delta, torch.ones(1, device=device))]).run("add")
    return matrix


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_VALUES = {
    "float32": tl.float32,
    "bfloat16": tl.bfloat16,
    "float16": tl.float16,
    "int8": tl.bfloat16,
}

VARIANTS = tuple(
    Variant(
        f"scatter-{action}-{'element' if side == 0 else side}-{coding}",
        _scatter,
        {"jobs": "*i64:16", "table": "*i64:16"},
        {"ROWS": ROWS, "JOB_WORDS": JOB_WORDS, "TYPE": _VALUES[coding], "VALUE": _VALUES[coding],
         "ACTION": action, "SIDES": side},
        # Values are loaded where they are added only.
        needs_load_bits=16 if side else 128 if action in ("fuse", "add") else 64,
    )
    for action, side, coding in (
        ("fuse", 0, "bfloat16"), ("fuse", 16, "bfloat16"), ("fuse", 0, "float32"),
        ("restore", 0, "bfloat16"), ("restore", 16, "bfloat16"), ("save", 0, "bfloat16"),
        ("add", 0, "bfloat16"), ("add", 32, "bfloat16"), ("round", 0, "bfloat16"),
    )
)  # fmt: skip
