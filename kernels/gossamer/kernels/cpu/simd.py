# ruff: noqa: ARG001 - numba reads an intrinsic's arguments from its signature
"""Loads, stores and arithmetic on register tiles (see `emit`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from gossamer.kernels.cpu import emit


@emit.instruction
def load_i64(_context: Any, address: Any) -> Any:
    """The int64 at `address`."""
    return types.int64(types.int64), lambda _c, b, _s, args: emit.load(b, args[0], emit.I64)


@emit.instruction
def load_i32(_context: Any, address: Any) -> Any:
    """The int32 at `address`, as int64."""
    return types.int64(types.int64), lambda _c, b, _s, args: b.sext(
        emit.load(b, args[0], emit.I32), emit.I64
    )


@emit.instruction
def load_u16(_context: Any, address: Any) -> Any:
    """The uint16 at `address`, as int64."""
    return types.int64(types.int64), lambda _c, b, _s, args: b.zext(
        emit.load(b, args[0], emit.I16), emit.I64
    )


@emit.instruction
def load_f32(_context: Any, address: Any) -> Any:
    """The float32 at `address`."""
    return types.float32(types.int64), lambda _c, b, _s, args: emit.load(b, args[0], emit.F32)


@emit.instruction
def load_f64(_context: Any, address: Any) -> Any:
    """The float64 at `address`, rounded to float32."""
    f64 = ir.DoubleType()

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        return b.fptrunc(b.load(emit.at(b, args[0]), typ=f64), emit.F32)

    return types.float32(types.int64), generate


@emit.instruction
def store_i64(_context: Any, address: Any, value: Any) -> Any:
    """Writes an int64."""

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        emit.store(b, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@emit.instruction
def store_i32(_context: Any, address: Any, value: Any) -> Any:
    """Writes the low 32 bits of an int64."""

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        emit.store(b, b.trunc(args[1], emit.I32), args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@emit.instruction
def store_u16(_context: Any, address: Any, value: Any) -> Any:
    """Writes the low 16 bits of an int64."""

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        emit.store(b, b.trunc(args[1], emit.I16), args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@emit.instruction
def store_f32(_context: Any, address: Any, value: Any) -> Any:
    """Writes a float32."""

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        emit.store(b, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@emit.instruction
def fetch_add(_context: Any, address: Any, amount: Any) -> Any:
    """Atomically adds to the int64 at `address`; the value before."""

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        return b.atomic_rmw("add", emit.at(b, args[0]), args[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@emit.instruction
def invoke(_context: Any, function: Any, argument: Any) -> Any:
    """Calls the C function at an address, with one int64; one that takes none ignores it."""

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [emit.I64])
        target = b.inttoptr(args[0], kind.as_pointer())
        b.call(target, [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@emit.instruction
def prefetch(_context: Any, address: Any) -> Any:
    """Asks for the cache line at `address`."""

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        emit.call(
            b,
            "llvm.prefetch.p0",
            ir.VoidType(),
            emit.at(b, args[0]),
            emit.I32(0),
            emit.I32(3),
            emit.I32(1),
        )
        return context.get_dummy_value()

    return types.void(types.int64), generate


@emit.instruction
def tile_zero(_context: Any, n: Any, width: Any) -> Any:
    """A tile of `n` zero vectors."""
    tile = emit.Tile(n.literal_value, width.literal_value)
    return tile(n, width), lambda c, _b, _s, _a: ir.Constant(c.get_value_type(tile), None)


@emit.instruction
def tile_load(_context: Any, rows: Any, columns: Any, width: Any, address: Any, stride: Any) -> Any:
    """A tile of rows * columns vectors; vector (r, c) is read from address + r * stride + the
    width of c vectors."""
    across = columns.literal_value
    tile = emit.Tile(rows.literal_value * across, width.literal_value)

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        value = ir.Constant(context.get_value_type(tile), ir.Undefined)
        for i in range(tile.n):
            start = b.add(args[3], b.mul(args[4], emit.I64(i // across)))
            vector = emit.load(b, start, emit.vector(tile.width), i % across * tile.width * 4)
            value = b.insert_value(value, vector, i)
        return value

    return tile(rows, columns, width, types.int64, types.int64), generate


@emit.instruction
def tile_store(_context: Any, tile: Any, columns: Any, address: Any, stride: Any) -> Any:
    """Writes the tile as `tile_load` reads it."""
    across = columns.literal_value

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        for i in range(tile.n):
            start = b.add(args[2], b.mul(args[3], emit.I64(i // across)))
            emit.store(b, b.extract_value(args[0], i), start, i % across * tile.width * 4)
        return context.get_dummy_value()

    return types.void(tile, columns, types.int64, types.int64), generate


@emit.instruction
def outer(
    _context: Any, acc: Any, columns: Any, a: Any, a_stride: Any, b: Any, b_stride: Any
) -> Any:
    """acc[r * columns + c] += a[r] * b[c]: float32 r at a + r * a_stride, vector c at
    b + c * b_stride."""
    count = columns.literal_value

    def generate(_c: Any, ib: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        tile, _, a0, sa, b0, sb = args
        right = [
            emit.load(ib, ib.add(b0, ib.mul(sb, emit.I64(c))), emit.vector(acc.width))
            for c in range(count)
        ]
        for r in range(acc.n // count):
            left = emit.splat(
                ib, emit.load(ib, ib.add(a0, ib.mul(sa, emit.I64(r))), emit.F32), acc.width
            )
            for c in range(count):
                i = r * count + c
                tile = ib.insert_value(
                    tile, emit.muladd(ib, left, right[c], ib.extract_value(tile, i)), i
                )
        return tile

    i8 = types.int64
    return acc(acc, columns, i8, i8, i8, i8), generate


@emit.instruction
def tile_scale(_context: Any, tile: Any, factor: Any) -> Any:
    """tile * factor (one float32)."""

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        s = emit.splat(b, args[1], tile.width)
        return emit.tile_map(b, args[0], lambda v, _: b.fmul(v, s))

    return tile(tile, types.float32), generate


@emit.instruction
def outer_rows(
    _context: Any, acc: Any, columns: Any, rows: Any, offset: Any, b: Any, b_stride: Any
) -> Any:
    """acc[r * columns + c] += a_r * b[c], with float32 a_r at rows[r] + offset (rows: int64 [R])
    and vector c at b + c * b_stride."""
    across = columns.literal_value

    def generate(_c: Any, ib: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        tile, _, rows, offset, b0, sb = args
        right = [
            emit.load(ib, ib.add(b0, ib.mul(sb, emit.I64(c))), emit.vector(acc.width))
            for c in range(across)
        ]

        def step(old: ir.Value, i: int) -> ir.Value:
            row = emit.load(ib, rows, emit.I64, 8 * (i // across))
            left = emit.splat(ib, emit.load(ib, ib.add(row, offset), emit.F32), acc.width)
            return emit.muladd(ib, left, right[i % across], old)

        return emit.tile_map(ib, tile, step)

    return acc(acc, columns, types.int64, types.int64, types.int64, types.int64), generate


@emit.instruction
def rows_load(_context: Any, n: Any, width: Any, rows: Any, offset: Any) -> Any:
    """A tile whose vector i is read from rows[i] + offset, rows: int64 [n]."""
    tile = emit.Tile(n.literal_value, width.literal_value)

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        def vector(_: ir.Value, i: int) -> ir.Value:
            return emit.load(
                b, b.add(emit.load(b, args[2], emit.I64, 8 * i), args[3]), emit.vector(tile.width)
            )

        return emit.tile_map(b, ir.Constant(context.get_value_type(tile), ir.Undefined), vector)

    return tile(n, width, types.int64, types.int64), generate


@emit.instruction
def rows_add(_context: Any, tile: Any, rows: Any, offset: Any) -> Any:
    """Adds vector i of the tile to the floats at rows[i] + offset, rows: int64 [n]."""

    def generate(context: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        for i in range(tile.n):
            at = b.add(emit.load(b, args[1], emit.I64, 8 * i), args[2])
            old = emit.load(b, at, emit.vector(tile.width))
            emit.store(b, b.fadd(old, b.extract_value(args[0], i)), at)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64), generate


@emit.instruction
def tile_transpose(_context: Any, tile: Any) -> Any:
    """The transpose of a square tile, as log2(n) rounds of interleaving."""
    n = tile.n

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        vectors = [b.extract_value(args[0], i) for i in range(n)]
        half = n // 2
        lanes = [
            [i // 2 + start + n * (i % 2) for i in range(n)] for start in (0, half)
        ]  # the lower and the upper halves, interleaved
        for _ in range(n.bit_length() - 1):
            vectors = [
                b.shuffle_vector(
                    vectors[i // 2],
                    vectors[half + i // 2],
                    ir.Constant(emit.vector(n, emit.I32), lanes[i % 2]),
                )
                for i in range(n)
            ]
        return emit.tile_map(b, args[0], lambda _, i: vectors[i])

    return tile(tile), generate


def _pairs(combine: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Any:
    """Code for an operation on the vectors of two tiles."""

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        right = args[1]
        return emit.tile_map(b, args[0], lambda v, i: combine(b, v, b.extract_value(right, i)))

    return generate


@emit.instruction
def tile_add(_context: Any, left: Any, right: Any) -> Any:
    """left + right."""
    return left(left, right), _pairs(lambda b, x, y: b.fadd(x, y))


@emit.instruction
def tile_sub(_context: Any, left: Any, right: Any) -> Any:
    """left - right."""
    return left(left, right), _pairs(lambda b, x, y: b.fsub(x, y))


@emit.instruction
def tile_mul(_context: Any, left: Any, right: Any) -> Any:
    """left * right."""
    return left(left, right), _pairs(lambda b, x, y: b.fmul(x, y))


@emit.instruction
def tile_muladd(_context: Any, left: Any, right: Any, addend: Any) -> Any:
    """left * right + addend."""

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        _, right, addend = args
        return emit.tile_map(
            b,
            args[0],
            lambda v, i: emit.muladd(b, v, b.extract_value(right, i), b.extract_value(addend, i)),
        )

    return left(left, right, addend), generate


@emit.instruction
def tile_keep_rows(_context: Any, tile: Any, count: Any) -> Any:
    """The first `count` vectors of the tile; zeros behind them."""

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        zero = emit.constant(tile.width, 0.0)
        return emit.tile_map(
            b, args[0], lambda v, i: b.select(b.icmp_signed("<", emit.I64(i), args[1]), v, zero)
        )

    return tile(tile, types.int64), generate


@emit.instruction
def tile_keep_lanes(_context: Any, tile: Any, count: Any) -> Any:
    """The first `count` lanes of every vector; zeros behind them."""
    w = tile.width

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        lanes = ir.Constant(emit.vector(w, emit.I64), list(range(w)))
        keep = b.icmp_signed("<", lanes, emit.splat(b, args[1], w))
        zero = emit.constant(w, 0.0)
        return emit.tile_map(b, args[0], lambda v, _: b.select(keep, v, zero))

    return tile(tile, types.int64), generate
