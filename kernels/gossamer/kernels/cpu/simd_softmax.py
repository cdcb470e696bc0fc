# ruff: noqa: ARG001 - numba reads an intrinsic's arguments from its signature
"""Masks, reductions and exponentials on register tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from gossamer.kernels.cpu import emit


@emit.instruction
def tile_mask(_context: Any, tile: Any, start: Any, low: Any, high: Any, otherwise: Any) -> Any:
    """Lane k of vector i where low <= start + i * width + k < high, elsewhere `otherwise`."""
    width = tile.width

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        values, start, low, high, otherwise = args
        fill = emit.splat(b, otherwise, width)
        lanes = ir.Constant(emit.vector(width, emit.I32), list(range(width)))

        def bound(limit: ir.Value, i: int) -> ir.Value:
            relative = b.sub(b.sub(limit, start), emit.I64(i * width))
            return emit.splat(b, b.trunc(relative, emit.I32), width)

        def select(v: ir.Value, i: int) -> ir.Value:
            inside = b.and_(
                b.icmp_signed(">=", lanes, bound(low, i)),
                b.icmp_signed("<", lanes, bound(high, i)),
            )
            return b.select(inside, v, fill)

        return emit.tile_map(b, values, select)

    i8 = types.int64
    return tile(tile, i8, i8, i8, types.float32), generate


def _reduce(combine: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Any:
    """Code for a reduction of a whole tile to one float32, in a fixed tree order."""

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        vectors = [b.extract_value(args[0], i) for i in range(args[0].type.count)]
        while len(vectors) > 1:
            half = len(vectors) // 2
            rest = vectors[2 * half :]
            vectors = [combine(b, vectors[i], vectors[half + i]) for i in range(half)] + rest
        value = vectors[0]
        width = value.type.count
        while width > 1:
            width //= 2
            undefined = ir.Constant(value.type, ir.Undefined)
            low, high = (
                b.shuffle_vector(
                    value, undefined, ir.Constant(emit.vector(width, emit.I32), list(lanes))
                )
                for lanes in (range(width), range(width, 2 * width))
            )
            value = combine(b, low, high)
        return b.extract_element(value, emit.I32(0))

    return generate


@emit.instruction
def tile_sum(_context: Any, tile: Any) -> Any:
    """The sum over all vectors and lanes, as a fixed tree."""
    return types.float32(tile), _reduce(lambda b, x, y: b.fadd(x, y))


@emit.instruction
def tile_max(_context: Any, tile: Any) -> Any:
    """The largest element. A NaN among them may win or lose."""

    def larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        return b.select(b.fcmp_ordered(">", x, y), x, y)

    return types.float32(tile), _reduce(larger)


#: exp(r) on |r| <= ln(2)/2 in Horner form, highest power first: the coefficients of Cephes' expf.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)


def _exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x), relative error below 2e-7, for x clamped to [-87, 88]; NaN stays NaN."""
    w = x.type.count

    def constant(value: float) -> ir.Constant:
        return emit.constant(w, value)

    x = b.select(b.fcmp_ordered("<", x, constant(-87.0)), constant(-87.0), x)
    x = b.select(b.fcmp_ordered(">", x, constant(88.0)), constant(88.0), x)
    shifted = emit.muladd(b, x, constant(_f32(1 / math.log(2))), constant(0.5))
    n = emit.call(b, f"llvm.floor.v{w}f32", x.type, shifted)
    r = emit.muladd(b, n, constant(-0.693359375), x)
    r = emit.muladd(b, n, constant(_f32(2.12194440e-4)), r)
    p = constant(_f32(_EXP[0]))
    for coefficient in _EXP[1:]:
        p = emit.muladd(b, p, r, constant(_f32(coefficient)))
    p = b.fadd(emit.muladd(b, p, b.fmul(r, r), r), constant(1.0))
    n = b.select(b.fcmp_ordered("ord", n, n), n, constant(0.0))  # p carries the NaN
    bits = b.shl(
        b.add(
            b.fptosi(n, emit.vector(w, emit.I32)), ir.Constant(emit.vector(w, emit.I32), [127] * w)
        ),
        ir.Constant(emit.vector(w, emit.I32), [23] * w),
    )
    return b.fmul(p, b.bitcast(bits, x.type))


def _f32(value: float) -> float:
    """LLVM wants float constants that are exact in fp32."""
    return float(np.float32(value))


@emit.instruction
def tile_exp_minus(_context: Any, tile: Any, offset: Any) -> Any:
    """exp(tile - offset)."""

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        s = emit.splat(b, args[1], tile.width)
        return emit.tile_map(b, args[0], lambda v, _: _exp(b, b.fsub(v, s)))

    return tile(tile, types.float32), generate


@emit.instruction
def tile_softcap(_context: Any, tile: Any, cap: Any) -> Any:
    """cap * tanh(tile / cap), with tanh(z) = 1 - 2 / (exp(2z) + 1)."""
    w = tile.width

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        cap = emit.splat(b, args[1], w)

        def capped(v: ir.Value, _: int) -> ir.Value:
            e = _exp(b, b.fmul(b.fdiv(v, cap), emit.constant(w, 2.0)))
            tail = b.fdiv(emit.constant(w, 2.0), b.fadd(e, emit.constant(w, 1.0)))
            return b.fmul(cap, b.fsub(emit.constant(w, 1.0), tail))

        return emit.tile_map(b, args[0], capped)

    return tile(tile, types.float32), generate


@emit.instruction
def tile_silu(_context: Any, tile: Any) -> Any:
    """tile / (1 + exp(-tile)); -inf stays -inf."""
    w = tile.width

    def generate(_c: Any, b: ir.IRBuilder, _sig: Any, args: list[ir.Value]) -> ir.Value:
        one = emit.constant(w, 1.0)
        return emit.tile_map(b, args[0], lambda v, _: b.fdiv(v, b.fadd(one, _exp(b, b.fneg(v)))))

    return tile(tile), generate
