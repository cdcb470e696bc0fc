"""The rows of a step as the delta kernels want them, and terms added to a product.

A chunk is up to 16 rows of the step with the same members (`plan`). Its x is copied transposed,
[in, W] with W the next power of two, so that one entry finds its column of x for all rows in one
place: 32 bytes instead of 16 places. The copy of a chunk begins at twice its first index into the
plan's order, times the columns: W is less than twice its rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.gpu.launch import TYPE_NAMES, launch, programs, require
from gossamer.kernels.gpu.variant import Variant
from gossamer.kernels.plan import CHUNK_ROWS, WorkPlan
from gossamer.kernels.terms import Terms

#: Columns of a block of a copy, and of a sum.
COLUMNS, SUM_COLUMNS = 256, 1024


@triton.jit
def next_power_of_2(count):
    """1, 2, 4, 8 or 16: the width of a chunk's copy."""
    return tl.where(
        count <= 1, 1, tl.where(count <= 2, 2, tl.where(count <= 4, 4, tl.where(count <= 8, 8, 16)))
    )


@triton.jit
def find_chunk(plan, chunk):
    """First index into the order, rows, first index into the sets, members."""
    words = plan + tl.load(plan + 3) + 4 * chunk
    first = tl.load(words).to(tl.int32)
    count = tl.load(words + 1).to(tl.int32)
    first_member = tl.load(words + 2).to(tl.int32)
    members = tl.load(words + 3).to(tl.int32)
    return first, count, first_member, members


@triton.jit
def _transpose_rows(
    copies, x, x_row, plan, columns, COLUMNS: tl.constexpr, CHUNK_ROWS: tl.constexpr
):
    """Semantics: copies[2 * first * columns + i * W + t] = x[order[first + t], i]; 0 for t ≥ count.

    An item is (chunk, block of columns).
    """
    chunks = tl.load(plan).to(tl.int32)
    order = plan + tl.load(plan + 1)
    blocks = tl.cdiv(columns, COLUMNS)
    for item in range(tl.program_id(0), chunks * blocks, tl.num_programs(0)):
        first, count, _, _ = find_chunk(plan, item // blocks)
        width = next_power_of_2(count)
        t = tl.arange(0, CHUNK_ROWS)
        i = item % blocks * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.load(order + first + t, mask=t < count, other=0)
        live = (t < count)[:, None] & (i < columns)[None, :]
        value = tl.load(x + row[:, None] * x_row + i[None, :], mask=live, other=0.0)
        at = copies + 2 * first.to(tl.int64) * columns + i[None, :] * width + t[:, None]
        tl.store(at, value, mask=(t < width)[:, None] & (i < columns)[None, :])


@triton.jit
def _add_terms(y, y_row, terms, touched, outputs, COLUMNS: tl.constexpr):
    """Semantics: y[t] = round(y[t] + terms[t]) for the rows t that are touched."""
    blocks = tl.cdiv(outputs, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    o = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    live = o < outputs
    if tl.load(touched + row) != 0:
        term = tl.load(terms + row * outputs + o, mask=live, other=0.0)
        total = tl.load(y + row * y_row + o, mask=live, other=0.0).to(tl.float32) + term
        tl.store(y + row * y_row + o, total.to(y.dtype.element_ty), mask=live)


def transposed(x: Tensor, plan: WorkPlan) -> Tensor:
    """The copies of all chunks of a step, [2 * rows * in]; see `_transpose_rows`."""
    copies = x.new_empty(2 * x.shape[0] * x.shape[1])
    launch(
        _transpose_rows, programs(x.device), copies, x, x.stride(0), plan.data, x.shape[1],
        COLUMNS=COLUMNS, CHUNK_ROWS=CHUNK_ROWS,
    )  # fmt: skip
    return copies


def add_terms(y: Tensor, terms: Terms) -> None:
    """See `gossamer.kernels.terms.Terms.add_to`."""
    require("y", y)
    launch(
        _add_terms, len(y) * -(-y.shape[1] // SUM_COLUMNS), y, y.stride(0), terms.values,
        terms.touched, y.shape[1], COLUMNS=SUM_COLUMNS,
    )  # fmt: skip


_CONSTANTS = {"COLUMNS": COLUMNS, "CHUNK_ROWS": CHUNK_ROWS}
VARIANTS = tuple(
    variant
    for dtype in TYPE_NAMES.values()
    if not dtype.startswith("i")
    for variant in (
        Variant(
            f"transpose_rows-{dtype}",
            _transpose_rows,
            {"copies": f"*{dtype}", "x": f"*{dtype}", "x_row": "i32", "plan": "*i64",
             "columns": "i32"},
            _CONSTANTS,
        ),
        Variant(
            f"add_terms-{dtype}",
            _add_terms,
            {"y": f"*{dtype}:16", "y_row": "i32:16", "terms": "*fp32:16", "touched": "*i64",
             "outputs": "i32:16"},
            {"COLUMNS": SUM_COLUMNS},
            needs_load_bits=128,
        ),
    )
)  # fmt: skip
