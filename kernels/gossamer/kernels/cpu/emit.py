"""Explicit SIMD for numba: a register tile, and the few operations that the kernels need on it.

numba alone vectorises a loop when LLVM finds that worthwhile, which for the gathers and the short
inner loops here it seldom does: the same sparse loop is 1.5 × slower in plain numba than in C. A
`Tile` is `n` vectors of `width` float32 that live in registers; the intrinsics below emit LLVM
vector instructions for it directly, so the machine code equals that of C with intrinsics, on any
target that LLVM knows (a 16-wide vector becomes two registers on AVX2 and four on NEON).

Conventions: addresses are int64 byte addresses, strides are in bytes. Nothing is checked here.
Multiply-add is `llvm.fmuladd`: fused where the target has it, the same choice in every kernel of a
process, so results do not depend on which kernel computed them. There is no fastmath.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

F32 = ir.FloatType()
I1 = ir.IntType(1)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
PTR = ir.PointerType()


def instruction(function: Callable[..., Any]) -> Any:
    """A numba intrinsic whose integer arguments arrive as constants where they are constants."""
    return intrinsic(prefer_literal=True)(function)


class Tile(types.Type):
    """`n` vectors of `width` float32 in registers."""

    def __init__(self, n: int, width: int) -> None:
        self.n = n
        self.width = width
        super().__init__(name=f"Tile({n}x{width})")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, tile: Tile) -> None:
        super().__init__(manager, tile, ir.ArrayType(vector(tile.width), tile.n))


def vector(width: int, element: ir.Type = F32) -> ir.VectorType:
    return ir.VectorType(element, width)


def at(b: ir.IRBuilder, address: ir.Value, offset: int = 0) -> ir.Value:
    return b.inttoptr(b.add(address, I64(offset)) if offset else address, PTR)


def load(b: ir.IRBuilder, address: ir.Value, ty: ir.Type, offset: int = 0) -> ir.Value:
    value = b.load(at(b, address, offset), typ=ty)
    value.align = element_bytes(ty)
    return value


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
    b.store(value, at(b, address, offset)).align = element_bytes(value.type)


def element_bytes(ty: ir.Type) -> int:
    element = ty.element if isinstance(ty, ir.VectorType) else ty
    return 4 if element == F32 else int(element.width) // 8


def splat(b: ir.IRBuilder, scalar: ir.Value, width: int) -> ir.Value:
    undefined = ir.Constant(vector(width, scalar.type), ir.Undefined)
    first = b.insert_element(undefined, scalar, I32(0))
    return b.shuffle_vector(first, undefined, ir.Constant(vector(width, I32), [0] * width))


def constant(width: int, value: float) -> ir.Constant:
    return ir.Constant(vector(width), [value] * width)


def call(b: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    function = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, function, name), args)


def muladd(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    suffix = f"v{x.type.count}f32" if isinstance(x.type, ir.VectorType) else "f32"
    return call(b, f"llvm.fmuladd.{suffix}", x.type, x, y, z)


def gather(b: ir.IRBuilder, base: ir.Value, index: ir.Value) -> ir.Value:
    """base[index] for a vector of int64 indices in units of float32."""
    width = index.type.count
    pointers = b.gep(at(b, base), [index], inbounds=True, source_etype=F32)
    pointers.type = vector(width, PTR)  # llvmlite derives the type from the base alone
    everywhere = ir.Constant(vector(width, I1), [1] * width)
    undefined = ir.Constant(vector(width), ir.Undefined)
    name = f"llvm.masked.gather.v{width}f32.v{width}p0"
    return call(b, name, vector(width), pointers, I32(4), everywhere, undefined)


def tile_map(
    b: ir.IRBuilder, tile: ir.Value, function: Callable[[ir.Value, int], ir.Value]
) -> ir.Value:
    for i in range(tile.type.count):
        tile = b.insert_value(tile, function(b.extract_value(tile, i), i), i)
    return tile
