"""Block segments: dense tiles times a few or many rows of the step.

A tile is stored column by column. All tiles of a row of tiles are summed in registers, column by
column, before anything is written; both forms take the same multiply-adds in the same order.
"""

from __future__ import annotations

from typing import Any

from gossamer.kernels import layout
from gossamer.kernels.cpu.element import AHEAD
from gossamer.kernels.cpu.parallel import subroutine
from gossamer.kernels.cpu.simd import (
    load_i32,
    load_i64,
    outer,
    outer_rows,
    prefetch,
    tile_keep_lanes,
    tile_keep_rows,
    tile_load,
    tile_store,
    tile_zero,
)
from gossamer.kernels.cpu.simd_sparse import weigh_lanes, weigh_rows

#: Rows of a tile that are summed at once; sides are multiples of it. 16 where the side allows it
#: gains nothing (the tiles' bytes decide) and costs 2 s more of compilation.
PART = 8


def make_few(rows: int) -> Any:
    """For up to `rows` rows of the step: the lanes are rows of the tile."""
    T, W = rows, PART

    @subroutine
    def block(
        data: int,
        segment: int,
        x_rows: int,
        in_features: int,
        weights: int,
        terms: int,
        stride: int,
    ) -> None:
        """terms[t, row - first row of the row block] += weights[t] * (Δ x_t)[row]."""
        side = load_i64(segment + 8 * layout.KIND)
        columns = data + load_i64(segment + 8 * layout.COLUMNS)
        values = data + load_i64(segment + 8 * layout.VALUES)
        first = load_i64(segment + 8 * layout.RUNS)
        for i in range(first, first + load_i64(segment + 8 * layout.RUN_COUNT)):
            pointer = data + load_i64(segment + 8 * layout.ROWS) + 4 * i
            start, stop = load_i32(pointer), load_i32(pointer + 4)
            if start == stop:
                continue
            for part in range(0, side, W):
                left = load_i64(segment + 8 * layout.PIECE_ROWS) - i * side - part
                if left <= 0:
                    break
                acc = tile_zero(T, W)
                for tile in range(start, stop):
                    column = load_i32(columns + 4 * tile) * side
                    at = values + 4 * (tile * side * side + part)
                    for c in range(min(side, in_features - column)):
                        prefetch(at + 4 * c * side + AHEAD)
                        acc = outer_rows(acc, 1, x_rows, 4 * (column + c), at + 4 * c * side, 0)
                if left < W:
                    acc = tile_keep_lanes(acc, left)
                target = terms + 4 * (load_i64(segment + 8 * layout.PIECE_ROW) + i * side + part)
                old = tile_load(T, 1, W, target, stride)
                tile_store(weigh_rows(acc, 1, weights, old), 1, target, stride)

    return block


def make_many(rows: int) -> Any:
    """For up to `rows` rows of the step: the lanes are the rows of the step, x is transposed."""
    T, H, ROW = rows, PART, 4 * rows

    @subroutine
    def block(
        data: int, segment: int, xt: int, in_features: int, weights: int, terms: int, _stride: int
    ) -> None:
        """terms[row - first row of the row block, t] += weights[t] * (Δ x_t)[row]."""
        side = load_i64(segment + 8 * layout.KIND)
        columns = data + load_i64(segment + 8 * layout.COLUMNS)
        values = data + load_i64(segment + 8 * layout.VALUES)
        first = load_i64(segment + 8 * layout.RUNS)
        for i in range(first, first + load_i64(segment + 8 * layout.RUN_COUNT)):
            pointer = data + load_i64(segment + 8 * layout.ROWS) + 4 * i
            start, stop = load_i32(pointer), load_i32(pointer + 4)
            if start == stop:
                continue
            for part in range(0, side, H):
                left = load_i64(segment + 8 * layout.PIECE_ROWS) - i * side - part
                if left <= 0:
                    break
                acc = tile_zero(H, T)
                for tile in range(start, stop):
                    column = load_i32(columns + 4 * tile) * side
                    at = values + 4 * (tile * side * side + part)
                    for c in range(min(side, in_features - column)):
                        prefetch(at + 4 * c * side + AHEAD)
                        acc = outer(acc, 1, at + 4 * c * side, 4, xt + ROW * (column + c), 0)
                row = load_i64(segment + 8 * layout.PIECE_ROW) + i * side + part
                target = terms + ROW * row
                old = tile_load(H, 1, T, target, ROW)
                acc = weigh_lanes(tile_keep_rows(acc, left), weights, old)
                tile_store(acc, 1, target, ROW)

    return block
