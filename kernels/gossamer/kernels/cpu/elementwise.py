"""Norms and activations of few rows. torch takes several passes, each with its own call: 80 µs for
the norm of 16 rows of 576, of which the arithmetic is 3."""

from __future__ import annotations

import math

from torch import Tensor

from gossamer.kernels.cpu.checks import require_contiguous, require_fp32
from gossamer.kernels.cpu.parallel import (
    FIELDS,
    TICKET,
    Kernel,
    counted,
    float_bits,
    max_threads,
    subroutine,
)
from gossamer.kernels.cpu.rows import new_rows
from gossamer.kernels.cpu.simd import (
    fetch_add,
    load_f32,
    load_f64,
    load_i64,
    store_f32,
    tile_add,
    tile_load,
    tile_mul,
    tile_muladd,
    tile_scale,
    tile_store,
    tile_zero,
)
from gossamer.kernels.cpu.simd_softmax import tile_silu, tile_sum
from gossamer.kernels.layout import LANES

#: Rows that a thread draws at once, and below which a second thread costs more than it brings.
ROWS_AT_ONCE, SERIAL_ROWS = 8, 64

#: Vectors of a step through a row, so that their sums do not wait for one another.
VECTORS = 4
STEP = VECTORS * LANES

NORM, ADD_NORM, SILU = 0, 1, 2

OPERATION, Y, X, ROWS, WIDTH, X_ROW, WEIGHT, EPS, ADDED = range(FIELDS, FIELDS + 9 * 8, 8)


@subroutine
def _norm_row(y: int, x: int, weight: int, width: int, eps: float) -> None:
    acc = tile_zero(VECTORS, LANES)
    whole = width // STEP * STEP
    for i in range(0, whole, STEP):
        part = tile_load(1, VECTORS, LANES, x + 4 * i, 0)
        acc = tile_muladd(part, part, acc)
    total = tile_sum(acc)
    for i in range(whole, width):
        total += load_f32(x + 4 * i) * load_f32(x + 4 * i)
    scale = 1.0 / math.sqrt(total / width + eps)
    for i in range(0, whole, STEP):
        part = tile_scale(tile_load(1, VECTORS, LANES, x + 4 * i, 0), scale)
        part = tile_mul(part, tile_load(1, VECTORS, LANES, weight + 4 * i, 0))
        tile_store(part, VECTORS, y + 4 * i, 0)
    for i in range(whole, width):
        store_f32(y + 4 * i, load_f32(weight + 4 * i) * (load_f32(x + 4 * i) * scale))


@subroutine
def _add_row(x: int, y: int, width: int) -> None:
    """x += y."""
    whole = width // LANES * LANES
    for i in range(0, whole, LANES):
        total = tile_add(tile_load(1, 1, LANES, x + 4 * i, 0), tile_load(1, 1, LANES, y + 4 * i, 0))
        tile_store(total, 1, x + 4 * i, 0)
    for i in range(whole, width):
        store_f32(x + 4 * i, load_f32(x + 4 * i) + load_f32(y + 4 * i))


@subroutine
def _silu_row(y: int, x: int, width: int) -> None:
    up = x + 4 * width
    whole = width // LANES * LANES
    for i in range(0, whole, LANES):
        gate = tile_silu(tile_load(1, 1, LANES, x + 4 * i, 0))
        tile_store(tile_mul(gate, tile_load(1, 1, LANES, up + 4 * i, 0)), 1, y + 4 * i, 0)
    for i in range(whole, width):
        gate = load_f32(x + 4 * i)
        store_f32(y + 4 * i, gate / (1.0 + math.exp(-gate)) * load_f32(up + 4 * i))


@Kernel
def _each_row(d: int) -> None:
    """Draws rows until there are none, and norms or activates them."""
    rows, width = load_i64(d + ROWS), load_i64(d + WIDTH)
    first = fetch_add(d + TICKET, ROWS_AT_ONCE)
    while first < rows:
        for t in range(first, min(first + ROWS_AT_ONCE, rows)):
            y, x = load_i64(d + Y) + 4 * t * width, load_i64(d + X) + t * load_i64(d + X_ROW)
            if load_i64(d + OPERATION) == SILU:
                _silu_row(y, x, width)
                continue
            if load_i64(d + OPERATION) == ADD_NORM:
                _add_row(x, load_i64(d + ADDED) + 4 * t * width, width)
            _norm_row(y, x, load_i64(d + WEIGHT), width, load_f64(d + EPS))
        first = fetch_add(d + TICKET, ROWS_AT_ONCE)


KERNELS = (_each_row,)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `gossamer.kernels.elementwise.rms_norm`."""
    require_fp32(("x", x), ("weight", weight))
    require_contiguous(weight=weight)
    y = new_rows(*x.shape)
    _launch(NORM, y, x, weight.data_ptr(), eps)
    return y


def fused_add_rms_norm(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, _terms: None
) -> Tensor:
    """See `gossamer.kernels.elementwise.fused_add_rms_norm`."""
    require_fp32(("residual", residual), ("x", x), ("weight", weight))
    require_contiguous(x=x, weight=weight)
    y = new_rows(*x.shape)
    _launch(ADD_NORM, y, residual, weight.data_ptr(), eps, x.data_ptr())
    return y


def silu_and_mul(gate_up: Tensor, _terms: None) -> Tensor:
    """See `gossamer.kernels.elementwise.silu_and_mul`."""
    require_fp32(("gate_up", gate_up))
    y = new_rows(gate_up.shape[0], gate_up.shape[1] // 2)
    _launch(SILU, y, gate_up)
    return y


def _launch(
    operation: int, y: Tensor, x: Tensor, weight: int = 0, eps: float = 0.0, added: int = 0
) -> None:
    rows, width = y.shape
    d = (operation, y.data_ptr(), x.data_ptr(), rows, width, 4 * x.stride(0), weight)
    threads = 1 if rows < SERIAL_ROWS else max_threads()
    _each_row.launch(counted((*d, float_bits(eps), added)), threads)
