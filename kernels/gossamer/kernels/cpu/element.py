"""Element segments: slices of sixteen sparse rows times a few or many rows of the step.

Both forms sum a row's entries in their stored order with the same multiply-adds, so a result does
not depend on which form computed it.
"""

from __future__ import annotations

from typing import Any

from gossamer.kernels import layout
from gossamer.kernels.cpu.parallel import subroutine
from gossamer.kernels.cpu.simd import load_i32, load_i64, prefetch, tile_zero
from gossamer.kernels.cpu.simd_sparse import (
    sell_gather,
    sell_rows,
    tile_gather,
    tile_pick,
    tile_put,
    tile_scatter,
    weigh_lanes,
    weigh_rows,
)
from gossamer.kernels.layout import LANES

INDEX_VECTOR, VALUE_VECTOR = 2 * LANES, 4 * LANES

#: How far ahead of its use a value is asked for, in bytes. The processor's own prefetch starts anew
#: in every 4 KiB page. 8 adapters in 16 rows, one core, ns an entry at 1 / 2.3 / 10 % density:
#: without 1.44 / - / 0.95, 512 bytes 1.22 / - / 0.82, 1024: 0.88 / 0.84 / 0.72,
#: 2048: 0.88 / 0.77 / 0.64, 3072: 0.86 / 0.66 / 0.63, 4096: 0.83 / 0.75 / 0.61.
AHEAD = 3072


def make_few(rows: int) -> Any:
    """For up to `rows` rows of the step: the lanes are the slice's rows, x is gathered."""
    T = rows

    @subroutine
    def element(
        data: int, segment: int, x_rows: int, _xt: int, weights: int, terms: int, stride: int
    ) -> None:
        """terms[t, row] += weights[t] * (Δ x_t)[row]; terms: float32, `stride` bytes a row t."""
        run = data + load_i64(segment + 8 * layout.RUNS)
        ids = data + load_i64(segment + 8 * layout.ROWS)
        columns = data + load_i64(segment + 8 * layout.COLUMNS)
        values = data + load_i64(segment + 8 * layout.VALUES)
        for _ in range(load_i64(segment + 8 * layout.RUN_COUNT)):
            length = load_i32(run)
            for _ in range(load_i32(run + 4)):
                acc = tile_zero(T, LANES)
                for _ in range(length):
                    acc = sell_gather(acc, values, columns, x_rows)
                    prefetch(values + AHEAD)
                    prefetch(columns + AHEAD // 2)
                    values += VALUE_VECTOR
                    columns += INDEX_VECTOR
                old = tile_gather(T, LANES, terms, stride, ids)
                tile_scatter(weigh_rows(acc, 1, weights, old), terms, stride, ids)
                ids += INDEX_VECTOR
            run += 8

    return element


def make_many(rows: int) -> Any:
    """For up to `rows` rows of the step: the lanes are the rows of the step, x is transposed."""
    T = rows

    @subroutine
    def element(
        data: int, segment: int, _x_rows: int, xt: int, weights: int, terms: int, _stride: int
    ) -> None:
        """terms[row, t] += weights[t] * (Δ x_t)[row]; xt: float32 [in_features, T]."""
        run = data + load_i64(segment + 8 * layout.RUNS)
        ids = data + load_i64(segment + 8 * layout.ROWS)
        columns = data + load_i64(segment + 8 * layout.COLUMNS)
        values = data + load_i64(segment + 8 * layout.VALUES)
        for _ in range(load_i64(segment + 8 * layout.RUN_COUNT)):
            length = load_i32(run)
            for _ in range(load_i32(run + 4)):
                acc = tile_zero(LANES, T)
                for _ in range(length):
                    acc = sell_rows(acc, values, columns, xt)
                    prefetch(values + AHEAD)
                    prefetch(columns + AHEAD // 2)
                    values += VALUE_VECTOR
                    columns += INDEX_VECTOR
                old = tile_pick(LANES, T, terms, ids)
                tile_put(weigh_lanes(acc, weights, old), terms, ids)
                ids += INDEX_VECTOR
            run += 8

    return element
