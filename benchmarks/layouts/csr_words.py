# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The same arrays as `csr`, and a kernel that keeps an entry and its 16 products in one thread.

Left alone, Triton spreads the 16 values of x that an entry needs over two threads, and column and
value, which one thread has loaded, reach them through shared memory: four barriers in every round.
Here x is read as pairs of 64-bit words, four bfloat16 each, and the sums are 16 tensors of one
number a thread, so nothing ever moves between threads until the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from benchmarks.layouts import csr
from benchmarks.layouts.csr import LANES, TILE_ROWS
from benchmarks.layouts.layout import Layout, Step, signature
from gossamer.kernels.gpu.variant import Variant

#: Rows of the step that the kernel is written for.
WIDTH = 16


@triton.jit
def _add_word(sums, word, value):
    """Four values of x times an entry, into four sums."""
    low, high = word.to(tl.uint32), (word >> 32).to(tl.uint32)
    first, second, third, fourth = sums
    first = tl.fma(value, (low << 16).to(tl.float32, bitcast=True), first)
    second = tl.fma(value, (low & 0xFFFF0000).to(tl.float32, bitcast=True), second)
    third = tl.fma(value, (high << 16).to(tl.float32, bitcast=True), third)
    fourth = tl.fma(value, (high & 0xFFFF0000).to(tl.float32, bitcast=True), fourth)
    return (first, second, third, fourth)


@triton.jit
def _store(y, sums, row, rows, T: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    for t in tl.static_range(4):
        total = tl.sum(tl.reshape(sums[t], [ROWS, LANES]), axis=1)
        tl.store(y + row * T + t, total, mask=row < rows)


@triton.jit
def _csr_words(
    y, x, starts, lengths, high, units, rows, columns, has_high,  # noqa: ARG001 - as all kernels
    T: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin, end = csr.row_units(starts, lengths, high, row, has_high, ROWS, TILE_ROWS)
    steps = tl.cdiv(tl.max(end - begin, axis=0), LANES)
    lane = tl.arange(0, ROWS * LANES) % LANES
    at, stop = csr.spread(begin, ROWS, LANES) + lane, csr.spread(end, ROWS, LANES)
    zero = tl.zeros([ROWS * LANES], tl.float32)
    sums0 = (zero, zero, zero, zero)
    sums1 = (zero, zero, zero, zero)
    sums2 = (zero, zero, zero, zero)
    sums3 = (zero, zero, zero, zero)
    words = x.to(tl.pointer_type(tl.uint64))
    for _ in range(steps):
        live = at < stop
        unit = tl.load(units + at, mask=live, other=0)
        value = (unit & 0xFFFF0000).to(tl.float32, bitcast=True)
        place = words + (unit & 0xFFFF).to(tl.int32)[:, None] * 4 + tl.arange(0, 2)[None, :]
        word0, word1 = tl.split(tl.load(place, mask=live[:, None], other=0))
        sums0 = _add_word(sums0, word0, value)
        sums1 = _add_word(sums1, word1, value)
        word2, word3 = tl.split(tl.load(place + 2, mask=live[:, None], other=0))
        sums2 = _add_word(sums2, word2, value)
        sums3 = _add_word(sums3, word3, value)
        at += LANES
    _store(y, sums0, row, rows, T, ROWS, LANES)
    _store(y + 4, sums1, row, rows, T, ROWS, LANES)
    _store(y + 8, sums2, row, rows, T, ROWS, LANES)
    _store(y + 12, sums3, row, rows, T, ROWS, LANES)


_PLAIN = csr.csr(TILE_ROWS)


def variant(width: int) -> Variant:
    """For one row of the step the plain kernel, whose threads share nothing either."""
    if width != WIDTH:
        return _PLAIN.variant(width)
    plain = _PLAIN.variant(width)
    constants = {name: plain.constants[name] for name in ("T", "ROWS", "TILE_ROWS", "LANES")}
    return Variant(
        f"csr_words-{width}",
        _csr_words,
        {**signature(csr.ARRAYS), "has_high": "i32"},
        constants,
        needs_load_bits=128,
    )


CSR_WORDS = Layout(
    "CSR, 4-byte units, x as words",
    lambda entries: csr.pack(entries, TILE_ROWS),
    variant,
    lambda width: Step(TILE_ROWS * LANES, width),
    only_bfloat16=True,
)
