# ruff: noqa: ARG001 - numba reads an intrinsic's arguments from its signature
"""Instructions for sparse rows: gathers, scatters and weighted sums on register tiles."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from gossamer.kernels.cpu import emit


@emit.instruction
def sell_gather(_context: Any, acc: Any, values: Any, columns: Any, rows: Any) -> Any:
    """acc[t] += values * x_t[columns]: one step of a slice, its lanes in the lanes of a vector.

    values: float32 [width]; columns: uint16 [width]; rows: int64 [n], the addresses of the x_t.
    """

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        tile, values, columns, rows = args
        value = emit.load(b, values, emit.vector(acc.width))
        index = b.zext(
            emit.load(b, columns, emit.vector(acc.width, emit.I16)),
            emit.vector(acc.width, emit.I64),
        )

        def step(old: ir.Value, t: int) -> ir.Value:
            return emit.muladd(
                b, value, emit.gather(b, emit.load(b, rows, emit.I64, 8 * t), index), old
            )

        return emit.tile_map(b, tile, step)

    return acc(acc, types.int64, types.int64, types.int64), generate


@emit.instruction
def sell_rows(_context: Any, acc: Any, values: Any, columns: Any, x: Any) -> Any:
    """acc[l] += values[l] * x[columns[l]]: one step of a slice, a vector of rows for each lane.

    values: float32 [n]; columns: uint16 [n]; x: float32 [in_features, width].
    """

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        tile, values, columns, x = args

        def step(old: ir.Value, lane: int) -> ir.Value:
            column = b.zext(emit.load(b, columns, emit.I16, 2 * lane), emit.I64)
            row = b.add(x, b.mul(column, emit.I64(4 * acc.width)))
            value = emit.splat(b, emit.load(b, values, emit.F32, 4 * lane), acc.width)
            return emit.muladd(b, value, emit.load(b, row, emit.vector(acc.width)), old)

        return emit.tile_map(b, tile, step)

    return acc(acc, types.int64, types.int64, types.int64), generate


@emit.instruction
def tile_gather(_context: Any, n: Any, width: Any, base: Any, stride: Any, index: Any) -> Any:
    """A tile whose vector i is float32 base[i * stride + index], index: uint16 [width]."""
    tile = emit.Tile(n.literal_value, width.literal_value)

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        index = b.zext(
            emit.load(b, args[4], emit.vector(tile.width, emit.I16)),
            emit.vector(tile.width, emit.I64),
        )
        value = ir.Constant(context.get_value_type(tile), ir.Undefined)
        return emit.tile_map(
            b,
            value,
            lambda _, i: emit.gather(b, b.add(args[2], b.mul(args[3], emit.I64(i))), index),
        )

    return tile(n, width, types.int64, types.int64, types.int64), generate


@emit.instruction
def tile_scatter(_context: Any, tile: Any, base: Any, stride: Any, index: Any) -> Any:
    """Writes the tile as `tile_gather` reads it; of equal indices the last lane stays."""
    w = tile.width

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        index = b.zext(emit.load(b, args[3], emit.vector(w, emit.I16)), emit.vector(w, emit.I64))
        everywhere = ir.Constant(emit.vector(w, emit.I1), [1] * w)
        for i in range(tile.n):
            start = emit.at(b, b.add(args[1], b.mul(args[2], emit.I64(i))))
            pointers = b.gep(start, [index], inbounds=True, source_etype=emit.F32)
            pointers.type = emit.vector(w, emit.PTR)
            value = b.extract_value(args[0], i)
            name = f"llvm.masked.scatter.v{w}f32.v{w}p0"
            emit.call(b, name, ir.VoidType(), value, pointers, emit.I32(4), everywhere)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64, types.int64), generate


def _picked(b: ir.IRBuilder, base: ir.Value, index: ir.Value, i: int, width: int) -> ir.Value:
    row = b.zext(emit.load(b, index, emit.I16, 2 * i), emit.I64)
    return b.add(base, b.mul(row, emit.I64(4 * width)))


@emit.instruction
def tile_pick(_context: Any, n: Any, width: Any, base: Any, index: Any) -> Any:
    """A tile whose vector i is row index[i] of float32 base[:, width], index: uint16 [n]."""
    tile = emit.Tile(n.literal_value, width.literal_value)

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        def vector(_: ir.Value, i: int) -> ir.Value:
            return emit.load(
                b, _picked(b, args[2], args[3], i, tile.width), emit.vector(tile.width)
            )

        return emit.tile_map(b, ir.Constant(context.get_value_type(tile), ir.Undefined), vector)

    return tile(n, width, types.int64, types.int64), generate


@emit.instruction
def tile_put(_context: Any, tile: Any, base: Any, index: Any) -> Any:
    """Writes the tile as `tile_pick` reads it."""

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        for i in range(tile.n):
            emit.store(b, b.extract_value(args[0], i), _picked(b, args[1], args[2], i, tile.width))
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64), generate


@emit.instruction
def weigh_rows(_context: Any, tile: Any, columns: Any, weights: Any, onto: Any) -> Any:
    """onto + weights[i // columns] * tile[i] for vector i; a weight of 0 leaves `onto` alone."""
    across = columns.literal_value

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        def add(value: ir.Value, i: int) -> ir.Value:
            weight = emit.load(b, args[2], emit.F32, 4 * (i // across))
            old = b.extract_value(args[3], i)
            new = emit.muladd(b, emit.splat(b, weight, tile.width), value, old)
            return b.select(b.fcmp_unordered("!=", weight, ir.Constant(emit.F32, 0.0)), new, old)

        return emit.tile_map(b, args[0], add)

    return tile(tile, columns, types.int64, onto), generate


@emit.instruction
def weigh_lanes(_context: Any, tile: Any, weights: Any, onto: Any) -> Any:
    """onto + weights * tile, weights: float32 [width]; a weight of 0 leaves `onto` alone."""

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        weight = emit.load(b, args[1], emit.vector(tile.width))
        member = b.fcmp_unordered("!=", weight, emit.constant(tile.width, 0.0))

        def add(value: ir.Value, i: int) -> ir.Value:
            old = b.extract_value(args[2], i)
            return b.select(member, emit.muladd(b, weight, value, old), old)

        return emit.tile_map(b, args[0], add)

    return tile(tile, types.int64, onto), generate
