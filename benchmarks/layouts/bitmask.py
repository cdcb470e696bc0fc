"""One bit for every element, for masks of 10 %: 1.25 bytes of position an entry, whatever the mask.

    masks   uint64 [tiles, words, 16]  for each 16 rows, word by word of 64 columns, a row's bits
    starts  int32 [rows]               a row's first value
    values  uint16 [n]                 bfloat16

A program expands 16 rows × 64 columns at a time: an element's value lies as far behind the start of
its row as bits are set before its own. Then it multiplies a dense tile, so x is read in order and
shared by the rows, and everything is done for all elements, ten times as often as there are
entries.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from benchmarks.layouts.entries import Entries
from benchmarks.layouts.layout import Layout, Packed, Step, signature
from gossamer.kernels.gpu.variant import Variant

ROWS = 16
WORD = 64


def pack(entries: Entries) -> Packed:
    """Bits and values."""
    tiles, words = -(-entries.rows // ROWS), -(-entries.columns // WORD)
    bits = np.zeros((tiles * ROWS, words * WORD), np.bool_)
    bits[entries.row, entries.column] = True
    masks = np.packbits(bits, axis=1, bitorder="little").view(np.uint64)
    starts = np.zeros(tiles * ROWS, np.int32)
    starts[: entries.rows] = entries.starts[:-1]
    arrays: dict[str, NDArray[Any]] = {
        "masks": masks.reshape(tiles, ROWS, words).transpose(0, 2, 1).copy(),
        "starts": starts,
        "values": entries.bits,
    }
    count, steps = len(entries.column), np.full(tiles, words)
    return Packed(entries.rows, entries.columns, count, arrays, count, steps)


@triton.jit
def _ones(word):
    """How many bits of each uint64 are set; the compiler knows this form."""
    pairs = word - ((word >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((eights * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def _bitmask(
    y, x, masks, starts, values, rows, columns,
    T: tl.constexpr, ROWS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    r, c, t = tl.arange(0, ROWS), tl.arange(0, WORD), tl.arange(0, T)
    words = tl.cdiv(columns, WORD)
    at = tl.load(starts + tile * ROWS + r)
    acc = tl.zeros([ROWS, WORD if T == 1 else T], tl.float32)
    below = (tl.full([WORD], 1, tl.uint64) << c.to(tl.uint64)) - 1
    for word in range(words):
        mask = tl.load(masks + (tile.to(tl.int64) * words + word) * ROWS + r)
        there = ((mask[:, None] >> c.to(tl.uint64)[None, :]) & 1) != 0
        place = at[:, None] + _ones(mask[:, None] & below[None, :])
        bits = tl.load(values + place, mask=there, other=0)
        value = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        column = word * WORD + c
        if T == 1:
            part = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
            acc = tl.fma(value, tl.broadcast_to(part[None, :], value.shape), acc)
        else:
            part = tl.load(x + column[:, None] * T + t[None, :], mask=(column < columns)[:, None],
                           other=0.0)  # fmt: skip
            acc = tl.dot(value.to(part.dtype), part, acc, input_precision="ieee")
        at += _ones(mask)
    row = tile * ROWS + r
    if T == 1:
        tl.store(y + row, tl.sum(acc, axis=1), mask=row < rows)
    else:
        tl.store(y + row[:, None] * T + t[None, :], acc, mask=(row < rows)[:, None])


def variant(width: int) -> Variant:
    """The kernel for so many rows of a step."""
    return Variant(
        f"bitmask-{width}",
        _bitmask,
        signature({"masks": "*u64:16", "starts": "*i32:16", "values": "*u16:16"}),
        {"T": width, "ROWS": ROWS, "WORD": WORD},
        tensor_cores=width > 1,
    )


def step(width: int) -> Step:
    """8 elements a thread, or 4 products of 16 × 16 by 16 × 8."""
    return Step(ROWS * WORD, 8 if width == 1 else 4)


BITMASK = Layout("bitmask", pack, variant, step)
