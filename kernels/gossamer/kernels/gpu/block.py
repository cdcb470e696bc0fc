"""Dense tiles times the rows of a step, on tensor cores.

An item is (chunk of rows, row of tiles). `STEP_COLUMNS` columns of tiles are one product: the tiles
side by side, and below each other the columns of x that they meet.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.delta import BoundDeltas
from gossamer.kernels.gpu import layout
from gossamer.kernels.gpu.launch import TYPE_NAMES, launch, programs
from gossamer.kernels.gpu.reading import BOUNDARIES, member_weights, part_of
from gossamer.kernels.gpu.rows import find_chunk, next_power_of_2
from gossamer.kernels.gpu.variant import Variant
from gossamer.kernels.plan import CHUNK_ROWS, WorkPlan

#: Columns of the tiles in one product; a program's four warps have 16 bytes a lane in flight.
STEP_COLUMNS = 64
#: Of a thread, by the width of a value. Left to itself, ptxas spills a few bytes on sm_80.
MAX_REGISTERS = {2: 96, 4: 168}


@triton.jit
def _tiles(
    record, copy, width, row_of_tiles, columns, PART: tl.constexpr, SIDE: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, STEP_COLUMNS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Δ x for one row of tiles, float32 [CHUNK_ROWS, SIDE]."""
    values = part_of(record, PART, VALUE)
    pointers = part_of(record, PART + 1, tl.int32)
    tile_columns = part_of(record, PART + 2, tl.uint16)
    first, end = tl.load(pointers + row_of_tiles), tl.load(pointers + row_of_tiles + 1)
    k, r, t = tl.arange(0, STEP_COLUMNS), tl.arange(0, SIDE), tl.arange(0, CHUNK_ROWS)
    acc = tl.zeros([CHUNK_ROWS, SIDE], tl.float32)
    for at in range(first, end, STEP_COLUMNS // SIDE):
        tile = at + k // SIDE
        there = tile < end
        column = tl.load(tile_columns + tile, mask=there, other=0).to(tl.int32) * SIDE + k % SIDE
        inside = there & (column < columns)
        x = tl.load(
            copy + column[None, :] * width + t[:, None],
            mask=inside[None, :] & (t < width)[:, None], other=0.0,
        )  # fmt: skip
        tiles = tl.load(
            values + tile[:, None].to(tl.int64) * (SIDE * SIDE) + (k % SIDE)[:, None]
            + r[None, :] * SIDE,
            mask=there[:, None], other=0.0,
        )  # fmt: skip
        acc = tl.dot(x, tiles.to(x.dtype), acc, input_precision="ieee")
    return acc


# As `_element`.
@triton.jit(
    do_not_specialize=["slot_words", "weight_row", "weight_member"],
    do_not_specialize_on_alignment=["table"],
)
def _block(
    terms, copies, table, slot_words, plan, weights, weight_row, weight_member, outputs, columns,
    PART: tl.constexpr, SIDE: tl.constexpr, CHUNK_ROWS: tl.constexpr,
    STEP_COLUMNS: tl.constexpr, PROJECTIONS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Semantics: terms[t, o] += Σ_j weights[t, j, proj(o)] · (Δ_{slot(t, j)} · x[t])[o], of tiles.

    Tiles of one side. Members in the order of their set; each product first, in fp32, then its
    weight.
    """
    chunks = tl.load(plan).to(tl.int32)
    order, sets = plan + tl.load(plan + 1), plan + tl.load(plan + 2)
    down = tl.cdiv(outputs, SIDE)
    t = tl.arange(0, CHUNK_ROWS)
    for item in range(tl.program_id(0), chunks * down, tl.num_programs(0)):
        first, count, first_member, members = find_chunk(plan, item // down)
        copy = copies + 2 * first.to(tl.int64) * columns
        live = t < count
        row = tl.load(order + first + t, mask=live, other=0)
        rows = item % down * SIDE + tl.arange(0, SIDE)
        total = tl.zeros([SIDE, CHUNK_ROWS], tl.float32)
        for j in range(members):
            record = table + slot_words * tl.load(sets + first_member + j)
            if tl.load(record + PART) != 0:
                product = _tiles(
                    record, copy, next_power_of_2(count), item % down, columns,
                    PART, SIDE, CHUNK_ROWS, STEP_COLUMNS, VALUE,
                )  # fmt: skip
                weight = member_weights(
                    weights + j * weight_member, weight_row, row, live,
                    tl.load(record + BOUNDARIES), rows, PROJECTIONS,
                )  # fmt: skip
                total += tl.where(weight != 0, weight * tl.trans(product), 0.0)
        at = terms + row[None, :] * outputs + rows[:, None]
        mask = live[None, :] & (rows < outputs)[:, None]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


def block(
    terms: Tensor, copies: Tensor, bound: BoundDeltas, plan: WorkPlan, weights: Tensor, side: int
) -> None:
    """Launch `_block`. terms: float32 [T, out]; copies: of `rows.transposed`."""
    outputs, columns = bound.shape
    row, member, _ = weights.stride()
    value = "bf16" if bound.coding == "int8" else TYPE_NAMES[copies.dtype]
    launch(
        _block, programs(terms.device), terms, copies, bound.table,
        bound.table.stride(0), plan.data, weights, row,
        member, outputs, columns, max_registers=MAX_REGISTERS[copies.itemsize],
        **_constants(side, weights.shape[2], value),
    )  # fmt: skip


_VALUES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}


def _constants(side: int, projections: int, value: str) -> dict[str, Any]:
    return {
        "PART": layout.BLOCKS + 3 * layout.TILE_SIDES.index(side),
        "SIDE": side,
        "CHUNK_ROWS": CHUNK_ROWS,
        "STEP_COLUMNS": STEP_COLUMNS,
        "PROJECTIONS": projections,
        "VALUE": _VALUES[value],
    }


VARIANTS = tuple(
    Variant(
        f"block-{side}-{dtype}",
        _block,
        {"terms": "*fp32:16", "copies": f"*{dtype}:16", "table": "*i64",
         "slot_words": "i32", "plan": "*i64:16", "weights": "*fp32:16", "weight_row": "i32",
         "weight_member": "i32", "outputs": "i32:16", "columns": "i32:16"},
        _constants(side, 1, dtype),
        max_registers=MAX_REGISTERS[4 if dtype == "fp32" else 2],
        # a row of a tile of 8 has 128 bits, and its loads are spread over more lanes
        needs_load_bits=64 if side == 8 else 128,
        # products of 8 columns are none of those that AMD's matrix units have
        tensor_cores=dtype != "fp32" and side > 8,
    )
    for side in layout.TILE_SIDES
    for dtype in ("bf16", "fp16", "fp32")
)  # fmt: skip
