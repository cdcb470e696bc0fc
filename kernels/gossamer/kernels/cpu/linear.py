"""Dense products of few rows, at the speed at which the weight comes from memory.

The library's product tiles for many rows: with 8 or 16 it takes twice the time of reading the
weight. Here every weight is loaded once into a register and multiplied by all rows at once, and the
lines of the next tile are asked for while this one is computed. Sums run over the inputs in their
order, whatever the number of rows, so a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gossamer.kernels.cpu.parallel import (
    FIELDS,
    TICKET,
    Kernel,
    counted,
    max_threads,
    subroutine,
)
from gossamer.kernels.cpu.rows import TILE_ROWS, filled, in_whole_tiles, new_rows
from gossamer.kernels.cpu.simd import (
    fetch_add,
    load_i64,
    outer,
    prefetch,
    tile_load,
    tile_store,
    tile_transpose,
    tile_zero,
)
from gossamer.kernels.layout import LANES
from gossamer.kernels.reference import linear as library

#: The most rows of a product with a weight stored as (in, out). With 1 to 3 the library's own takes
#: the same time, but cannot be part of a program (`program`); with more it is the faster one.
MOST_ROWS = 24

#: The rows for which this is faster than the library where the weight is stored as (out, in).
ROWS_OUT_IN = range(3, 17)

#: Inputs per pass over a ticket's columns: their weights stay in the first cache for all rows.
DEPTH = 32

#: How far ahead of its use a weight is asked for, in bytes of its own row.
AHEAD = 128

#: The same for a weight stored as (out, in), whose rows are read sixteen at a time.
AHEAD_IN_ROW = 256

#: Rows of such a weight in a ticket.
OUTPUTS_PER_TICKET = 1024

VECTOR = 4 * LANES

Y, X, WEIGHT, ROWS, INPUTS, OUTPUTS, WIDTH, BIAS = range(FIELDS, FIELDS + 8 * 8, 8)


def _make_tile(vectors: int) -> Any:
    R, C = TILE_ROWS, vectors
    RC = R * C

    @subroutine
    def tile(d: int, row: int, column: int, first: int, last: int) -> None:
        """y[row : row + R, column : column + 16 C] += x[:, first:last] · W[first:last, …]; the
        first part begins with the bias."""
        stride, x_stride = 4 * load_i64(d + OUTPUTS), 4 * load_i64(d + INPUTS)
        y = load_i64(d + Y) + row * stride + 4 * column
        x = load_i64(d + X) + row * x_stride
        w = load_i64(d + WEIGHT) + first * stride + 4 * column
        acc = tile_zero(RC, LANES)
        bias = load_i64(d + BIAS)
        if first > 0:
            acc = tile_load(R, C, LANES, y, stride)
        elif bias != 0:
            acc = tile_load(R, C, LANES, bias + 4 * column, 0)
        for i in range(first, last):
            for c in range(C):
                prefetch(w + VECTOR * c + AHEAD)
            acc = outer(acc, C, x + 4 * i, x_stride, w, VECTOR)
            w += stride
        tile_store(acc, C, y, stride)

    return tile


_two_vectors, _one_vector = _make_tile(2), _make_tile(1)


@Kernel
def _columns(d: int) -> None:
    """y = x W, W (in, out) with a multiple of 16 columns; a ticket is `WIDTH` columns."""
    rows, inputs = load_i64(d + ROWS), load_i64(d + INPUTS)
    outputs, width = load_i64(d + OUTPUTS), load_i64(d + WIDTH)
    start = width * fetch_add(d + TICKET, 1)
    while start < outputs:
        end = min(outputs, start + width)
        for first in range(0, inputs, DEPTH):
            last = min(inputs, first + DEPTH)
            for column in range(start, end, 2 * LANES):
                for row in range(0, rows, TILE_ROWS):
                    if column + LANES < end:
                        _two_vectors(d, row, column, first, last)
                    else:
                        _one_vector(d, row, column, first, last)
        start = width * fetch_add(d + TICKET, 1)


@subroutine
def _sixteen(d: int, output: int) -> None:
    """y[:, output : output + 16] = x · W[output : output + 16]ᵀ; x is transposed, [in, 16]."""
    inputs = load_i64(d + INPUTS)
    stride = 4 * inputs
    w = load_i64(d + WEIGHT) + output * stride
    x = load_i64(d + X)
    acc = tile_zero(LANES, LANES)
    for first in range(0, inputs, LANES):
        for r in range(LANES):
            prefetch(w + r * stride + AHEAD_IN_ROW)
        for _ in range(first, min(inputs, first + LANES)):
            acc = outer(acc, 1, w, stride, x, 0)
            w += 4
            x += VECTOR
    y = load_i64(d + Y) + 4 * output
    tile_store(tile_transpose(acc), 1, y, 4 * load_i64(d + OUTPUTS))


@Kernel
def _rows(d: int) -> None:
    """y = x Wᵀ, W (out, in) with at least 16 rows, x transposed; a ticket is `WIDTH` outputs."""
    outputs, width = load_i64(d + OUTPUTS), load_i64(d + WIDTH)
    start = width * fetch_add(d + TICKET, 1)
    while start < outputs:
        for output in range(start, min(outputs, start + width), LANES):
            # The last tile reaches back over its neighbour, and writes the same numbers there.
            _sixteen(d, min(output, outputs - LANES))
        start = width * fetch_add(d + TICKET, 1)


KERNELS = (_columns, _rows)


@functools.cache
def _wide_vectors() -> bool:
    """Whether a vector is one register. With half the width the tiles would not fit into sixteen
    registers, and the library is better."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x: Tensor, weight: Tensor, transposed: bool, bias: Tensor | None) -> Tensor:
    """See `gossamer.kernels.linear`."""
    rows, outputs = x.shape[0], weight.shape[1 if transposed else 0]
    few = 0 < rows <= MOST_ROWS if transposed else rows in ROWS_OUT_IN
    fits = outputs % LANES == 0 if transposed else outputs >= LANES
    plain = weight.is_contiguous() and x.dtype is weight.dtype is torch.float32
    if not (few and fits and plain and _wide_vectors()):
        return library.linear(x, weight, transposed, bias)
    if transposed:
        return _by_columns(x, weight, bias)
    y = _by_rows(x, weight)
    return y if bias is None else y.add_(bias)


def _by_columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, (inputs, outputs) = x.shape[0], weight.shape
    x, y = in_whole_tiles(x), new_rows(rows, outputs)
    first = 0 if bias is None else bias.data_ptr()
    threads = max_threads()
    share = -(-outputs // (2 * LANES * threads)) * 2 * LANES
    d = (y.data_ptr(), x.data_ptr(), weight.data_ptr(), filled(rows), inputs, outputs, share, first)
    _columns.launch(counted(d), threads)
    return y


def _by_rows(x: Tensor, weight: Tensor) -> Tensor:
    rows, (outputs, inputs) = x.shape[0], weight.shape
    xt = torch.zeros(inputs, LANES)
    xt[:, :rows] = x.t()
    y = torch.empty(LANES, outputs)
    d = (y.data_ptr(), xt.data_ptr(), weight.data_ptr(), LANES, inputs, outputs)
    _rows.launch(counted((*d, OUTPUTS_PER_TICKET, 0)), max_threads())
    return y[:rows]
