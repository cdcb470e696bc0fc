"""Keys and values into their pages."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.gpu.elementwise import arguments, with_terms
from gossamer.kernels.gpu.launch import launch, require
from gossamer.kernels.gpu.variant import Variant
from gossamer.kernels.terms import Terms

#: For all heads of a row at once: Llama 8B's 48 of 128 are 24 numbers a thread.
ROTATE_WARPS = 8


@triton.jit
def _to_page(
    pages, page_stride, slots, row, head, page_size, num_pages, i, DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Where a row's key or value of one head goes, and which of `WIDTH` numbers have a place."""
    wide = tl.load(slots + row)
    there = (wide >= 0) & (wide < num_pages * page_size)
    slot = wide.to(tl.int32)  # a division of 64 bits is a loop
    page, offset = (slot // page_size).to(tl.int64), slot % page_size
    at = pages + page * page_stride + (head * page_size + offset) * DIM + i
    return at, i < tl.where(there, WIDTH, 0)


@triton.jit
def _write_kv(
    k, v, k_row, k_head, v_row, v_head, k_pages, v_pages, page_stride, slots, kv_heads, page_size,
    num_pages, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Semantics: pages[slots[t] // page_size, h, slots[t] % page_size] = (k[t, h], v[t, h]).

    A slot outside the pages is not written.
    """
    row, head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    i = tl.arange(0, WIDTH)
    mask = i < DIM
    at, there = _to_page(k_pages, page_stride, slots, row, head, page_size, num_pages, i, DIM, DIM)
    key = tl.load(k + row * k_row + head * k_head + i, mask=mask)
    tl.store(at, key.to(k_pages.dtype.element_ty), mask=there)
    at, there = _to_page(v_pages, page_stride, slots, row, head, page_size, num_pages, i, DIM, DIM)
    value = tl.load(v + row * v_row + head * v_head + i, mask=mask)
    tl.store(at, value.to(v_pages.dtype.element_ty), mask=there)


@triton.jit
def _rotate_and_write(
    qkv, cos, sin, terms, touched, k_pages, v_pages, page_stride, slots, heads, kv_heads,
    page_size, num_pages,
    DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Semantics: q, k = rotated by (cos, sin), in place; k and v also go into their pages.

    A program does all heads of a row. A head x becomes x · cos + (-right half, left half) · sin,
    each product and the sum rounded. With TERMS, qkv has them added first (v only in its pages).
    """
    row = tl.program_id(0).to(tl.int64)
    i, head = tl.arange(0, HALF), tl.arange(0, HEADS)[:, None]
    inside = i < DIM // 2
    mask = (head < heads) & inside[None, :]
    at = (row * heads + head) * DIM + i[None, :]
    left, right = tl.load(qkv + at, mask=mask), tl.load(qkv + at + DIM // 2, mask=mask)
    narrow = left.dtype
    x = with_terms(left, terms, touched, row, at, mask, TERMS)
    y = with_terms(right, terms, touched, row, at + DIM // 2, mask, TERMS)
    first_value = heads - kv_heads
    first_key = first_value - kv_heads
    angle = row * DIM + i
    c = tl.load(cos + angle, mask=inside).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=inside).to(tl.float32)[None, :]
    d = tl.load(cos + angle + DIM // 2, mask=inside).to(tl.float32)[None, :]
    r = tl.load(sin + angle + DIM // 2, mask=inside).to(tl.float32)[None, :]
    a, b = (x * c).to(narrow).to(tl.float32), (-y * s).to(narrow).to(tl.float32)
    e, f = (y * d).to(narrow).to(tl.float32), (x * r).to(narrow).to(tl.float32)
    rotates = mask & (head < first_value)
    x = tl.where(rotates, a + b, x).to(narrow)
    y = tl.where(rotates, e + f, y).to(narrow)
    tl.store(qkv + at, x, mask=rotates)
    tl.store(qkv + at + DIM // 2, y, mask=rotates)
    key, there = _to_page(k_pages, page_stride, slots, row, head - first_key, page_size, num_pages,
                          i, DIM, DIM // 2)  # fmt: skip
    keys = rotates & (head >= first_key) & there[None, :]
    tl.store(key, x.to(k_pages.dtype.element_ty), mask=keys)
    tl.store(key + DIM // 2, y.to(k_pages.dtype.element_ty), mask=keys)
    value, _ = _to_page(v_pages, page_stride, slots, row, head - first_value, page_size, num_pages,
                        i, DIM, DIM // 2)  # fmt: skip
    values = mask & (head >= first_value) & there[None, :]
    tl.store(value, x.to(v_pages.dtype.element_ty), mask=values)
    tl.store(value + DIM // 2, y.to(v_pages.dtype.element_ty), mask=values)


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """See `gossamer.kernels.attention.write_kv`."""
    require("k", k)
    require("v", v, like=k)
    num_pages, kv_heads, page_size, dim = k_pages.shape
    launch(
        _write_kv, len(k) * kv_heads, k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        k_pages, v_pages, k_pages.stride(0), slots, kv_heads, page_size, num_pages, num_warps=1,
        DIM=dim, WIDTH=triton.next_power_of_2(dim),
    )  # fmt: skip


def rotate_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    terms: Terms | None,
) -> None:
    """See `gossamer.kernels.attention.rotate_and_write`."""
    require("qkv", qkv)
    require("cos", cos, like=qkv)
    require("sin", sin, like=qkv)
    num_pages, kv_heads, page_size, dim = k_pages.shape
    heads = qkv.shape[1] // dim
    launch(
        _rotate_and_write, len(qkv), qkv, cos.contiguous(), sin.contiguous(),
        *arguments(terms, qkv), k_pages, v_pages, k_pages.stride(0), slots, heads, kv_heads,
        page_size, num_pages,
        num_warps=ROTATE_WARPS, DIM=dim, HALF=triton.next_power_of_2(dim // 2),
        HEADS=triton.next_power_of_2(heads), TERMS=terms is not None,
    )  # fmt: skip


def _variants(dtype: str) -> tuple[Variant, ...]:
    value = f"*{dtype}:16"
    pages = {"k_pages": value, "v_pages": value, "page_stride": "i32:16", "slots": "*i64:16"}
    sizes = {"kv_heads": "i32", "page_size": "i32:16", "num_pages": "i32"}
    return (
        Variant(
            f"write_kv-{dtype}",
            _write_kv,
            {"k": value, "v": value, "k_row": "i32:16", "k_head": "i32:16", "v_row": "i32:16",
             "v_head": "i32:16", **pages, **sizes},
            {"DIM": 128, "WIDTH": 128},
            num_warps=1,
            needs_load_bits=64,
        ),
        Variant(
            f"rotate_and_write-{dtype}-terms",
            _rotate_and_write,
            {"qkv": value, "cos": value, "sin": value, "terms": "*fp32:16", "touched": "*i64:16",
             **pages, "heads": "i32", **sizes},
            {"DIM": 128, "HALF": 64, "HEADS": 64, "TERMS": True},
            num_warps=ROTATE_WARPS,
            needs_load_bits=128,
        ),
    )  # fmt: skip


VARIANTS = tuple(variant for dtype in ("bf16", "fp16", "fp32") for variant in _variants(dtype))
