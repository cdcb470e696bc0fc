"""Single entries times the rows of a step, by gathering from the copies of their x.

An item is (chunk of rows, `ITEM_ROWS` output rows). Four lanes share an output row: each takes
every fourth unit, and the four sums are added in pairs at the end. So a term's bits depend on the
delta alone, not on the width of the chunk, the grid, or what else the step computes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.delta import BoundDeltas
from gossamer.kernels.gpu.launch import TYPE_NAMES, launch, programs
from gossamer.kernels.gpu.reading import (
    BOUNDARIES,
    FORM,
    GROUP,
    LANES,
    SCALES,
    SPLIT8,
    UNITS,
    VALUES8,
    group_gap,
    group_value,
    load_group,
    member_weights,
    part_of,
    row_units,
    spread,
    value_of,
)
from gossamer.kernels.gpu.rows import find_chunk
from gossamer.kernels.gpu.variant import Variant
from gossamer.kernels.plan import WorkPlan

#: Output rows that a program does at once: it takes as many steps as its longest row, so with an
#: uneven mask 128 rows go through 9 places for an entry, 32 through 6, 8 through 3; but the fewer
#: they are, the less a program has in flight. See the decision record on layouts.
ROWS = 32
#: Output rows of an item, which first reads its chunk, its members and their records, one after the
#: other.
ITEM_ROWS = 128
NUM_WARPS = 4
#: Of a thread, by the width of a value. Left to itself, ptxas spills a few bytes in some variants.
MAX_REGISTERS = {2: 96, 4: 168}


@triton.jit
def _add(acc, copy, column, value, live, T: tl.constexpr):
    """acc[n, t] += value[n] * x[t, column[n]], rounded once, in fp32."""
    t = tl.arange(0, T)
    x = tl.load(copy + column[:, None] * T + t[None, :], mask=live[:, None], other=0.0)
    wide = tl.broadcast_to(value[:, None], x.shape)
    return tl.fma(wide, x.to(tl.float32), acc)


@triton.jit
def _singles(acc, record, copy, at, end, steps, T: tl.constexpr, KIND: tl.constexpr):
    """Units of one entry, as exact as the chunk's dtype: PAIR or WORD."""
    if KIND == "fp32":
        units = part_of(record, UNITS, tl.int64)
    else:
        units = part_of(record, UNITS, tl.int32)
    for k in range(steps):
        here = at + k * LANES
        unit = tl.load(units + here, mask=here < end, other=0)
        column = (unit & 0xFFFF).to(tl.int32)
        if KIND == "fp32":
            value = (unit >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        else:
            value = value_of(unit >> 16, KIND == "fp16")
        acc = _add(acc, copy, column, value, here < end, T)
    return acc


@triton.jit
def _splits(acc, record, copy, at, end, steps, T: tl.constexpr):
    """Units of one entry, column and int8 value apart."""
    columns, values = part_of(record, UNITS, tl.uint16), part_of(record, VALUES8, tl.int8)
    for k in range(steps):
        here = at + k * LANES
        column = tl.load(columns + here, mask=here < end, other=0).to(tl.int32)
        value = tl.load(values + here, mask=here < end, other=0).to(tl.float32)
        acc = _add(acc, copy, column, value, here < end, T)
    return acc


@triton.jit
def _groups(
    acc, record, copy, at, end, steps,
    T: tl.constexpr, SLOTS: tl.constexpr, EIGHT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Units of several entries; GROUP8 with EIGHT, else GROUP."""
    units = part_of(record, UNITS, tl.int64)
    for k in range(steps):
        here = at + k * LANES
        low, high = load_group(units, here, here < end)
        column = (low & 0xFFFF).to(tl.int32)
        for slot in tl.static_range(SLOTS):
            if slot > 0:
                column += group_gap(low, slot)
            value = group_value(low, high, slot, EIGHT, HALF)
            acc = _add(acc, copy, column, value, here < end, T)
    return acc


@triton.jit
def _product(
    record, copy, rows, T: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, INT8: tl.constexpr
):
    """Δ x for some output rows and all rows of a chunk, float32 [ROWS, T]."""
    first, length = row_units(record, rows, ROWS)
    steps = tl.cdiv(tl.max(length, axis=0), LANES)
    lane = tl.reshape(tl.broadcast_to(tl.arange(0, LANES)[None, :], [ROWS, LANES]), [ROWS * LANES])
    at, end = spread(first, ROWS) + lane, spread(first + length, ROWS)
    acc = tl.zeros([ROWS * LANES, T], tl.float32)
    form = tl.load(record + FORM)
    HALF: tl.constexpr = KIND == "fp16"
    if INT8:
        if form == SPLIT8:
            acc = _splits(acc, record, copy, at, end, steps, T)
        else:
            acc = _groups(acc, record, copy, at, end, steps, T, 7, True, HALF)
    elif KIND == "fp32":
        acc = _singles(acc, record, copy, at, end, steps, T, KIND)
    elif form == GROUP:
        acc = _groups(acc, record, copy, at, end, steps, T, 5, False, HALF)
    else:
        acc = _singles(acc, record, copy, at, end, steps, T, KIND)
    # Lanes in pairs, spelled out: how the compiler would reduce depends on T.
    even, odd = tl.split(tl.permute(tl.reshape(acc, [ROWS, LANES // 2, 2, T]), (0, 1, 3, 2)))
    left, right = tl.split(tl.permute(even + odd, (0, 2, 1)))
    product = left + right
    if INT8:
        scale = tl.load(part_of(record, SCALES, tl.bfloat16) + rows).to(tl.float32)
        product = product * scale[:, None]
    return product


@triton.jit
def _chunk(
    terms, copy, table, slot_words, sets, order, weights, weight_row, weight_member, begin, outputs,
    count, members,
    T: tl.constexpr, ROWS: tl.constexpr, ITEM_ROWS: tl.constexpr, PROJECTIONS: tl.constexpr,
    KIND: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One item, for chunks of up to T rows."""
    live = tl.arange(0, T) < count
    row = tl.load(order + tl.arange(0, T), mask=live, other=0)
    for low in range(begin, tl.minimum(begin + ITEM_ROWS, outputs), ROWS):
        rows = low + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, T], tl.float32)
        for j in range(members):
            record = table + slot_words * tl.load(sets + j)
            if tl.load(record + UNITS) != 0:
                product = _product(record, copy, rows, T, ROWS, KIND, INT8)
                weight = member_weights(
                    weights + j * weight_member, weight_row, row, live,
                    tl.load(record + BOUNDARIES), rows, PROJECTIONS,
                )  # fmt: skip
                total += tl.where(weight != 0, weight * product, 0.0)
        at = terms + row[None, :] * outputs + rows[:, None]
        tl.store(at, total, mask=live[None, :] & (rows < outputs)[:, None])


# Strides of weights differ between a graph and a single launch, and every other patched weight's
# records begin at 8 bytes beside a multiple of 16: neither is worth another compiled form.
@triton.jit(
    do_not_specialize=["slot_words", "weight_row", "weight_member"],
    do_not_specialize_on_alignment=["table"],
)
def _element(
    terms, copies, table, slot_words, plan, weights, weight_row, weight_member, outputs, columns,
    ITEM_ROWS: tl.constexpr, ROWS: tl.constexpr, PROJECTIONS: tl.constexpr, KIND: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    """Semantics: terms[t, o] = Σ_j weights[t, j, proj(o)] · (Δ_{slot(t, j)} · x[t])[o], entries.

    Every output of a row with members is written, 0 where no member has an entry. Members in the
    order of their set; each product first, in fp32, then its weight.
    """
    chunks = tl.load(plan).to(tl.int32)
    order, sets = plan + tl.load(plan + 1), plan + tl.load(plan + 2)
    blocks = tl.cdiv(outputs, ITEM_ROWS)
    for item in range(tl.program_id(0), chunks * blocks, tl.num_programs(0)):
        first, count, first_member, members = find_chunk(plan, item // blocks)
        copy = copies + 2 * first.to(tl.int64) * columns
        begin = item % blocks * ITEM_ROWS
        for power in tl.static_range(5):
            if (count > (1 << power) // 2) & (count <= 1 << power):
                _chunk(
                    terms, copy, table, slot_words, sets + first_member, order + first, weights,
                    weight_row, weight_member, begin, outputs, count, members,
                    1 << power, ROWS, ITEM_ROWS, PROJECTIONS, KIND, INT8,
                )  # fmt: skip


def element(
    terms: Tensor, copies: Tensor, bound: BoundDeltas, plan: WorkPlan, weights: Tensor, int8: bool
) -> None:
    """Launch `_element`. terms: float32 [T, out]; copies: of `rows.transposed`."""
    outputs, columns = bound.shape
    row, member, projection = weights.stride()
    del projection  # contiguous
    launch(
        _element, programs(terms.device), terms, copies, bound.table,
        bound.table.stride(0), plan.data, weights, row,
        member, outputs, columns, num_warps=NUM_WARPS, max_registers=MAX_REGISTERS[copies.itemsize],
        ITEM_ROWS=ITEM_ROWS, ROWS=ROWS, PROJECTIONS=weights.shape[2],
        KIND=TYPE_NAMES[copies.dtype], INT8=int8,
    )  # fmt: skip


def _variant(dtype: str, projections: int, int8: bool) -> Variant:
    name = f"element-{dtype}" + ("-int8" if int8 else "") + (f"-p{projections}" * (projections > 1))
    return Variant(
        name,
        _element,
        {"terms": "*fp32:16", "copies": f"*{dtype}:16", "table": "*i64",
         "slot_words": "i32", "plan": "*i64:16", "weights": "*fp32:16", "weight_row": "i32",
         "weight_member": "i32", "outputs": "i32:16", "columns": "i32:16"},
        {"ITEM_ROWS": ITEM_ROWS, "ROWS": ROWS, "PROJECTIONS": projections, "KIND": dtype,
         "INT8": int8},
        num_warps=NUM_WARPS, max_registers=MAX_REGISTERS[4 if dtype == "fp32" else 2],
        needs_load_bits=64 if dtype == "fp32" and not int8 else 128,
    )  # fmt: skip


VARIANTS = (
    _variant("bf16", 1, False),
    _variant("bf16", 3, False),
    _variant("bf16", 1, True),
    _variant("fp16", 1, False),
    _variant("fp32", 1, False),
    _variant("fp32", 1, True),
)
