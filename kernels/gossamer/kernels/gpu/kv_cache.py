"""Keys and values into their pages, one program a row and head."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.gpu.elementwise import arguments, with_terms
from gossamer.kernels.gpu.launch import launch, require
from gossamer.kernels.gpu.variant import Variant
from gossamer.kernels.terms import Terms


@triton.jit
def _to_page(
    pages, slots, row, head, kv_heads, page_size, num_pages, i, DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Where a row's key or value of one head goes, and which of `WIDTH` numbers have a place."""
    slot = tl.load(slots + row)
    page, offset = slot // page_size, slot % page_size
    there = (slot >= 0) & (page < num_pages)
    at = pages + ((page * kv_heads + head) * page_size + offset) * DIM + i
    return at, i < tl.where(there, WIDTH, 0)


@triton.jit
def _write_kv(
    k, v, k_row, k_head, v_row, v_head, k_pages, v_pages, slots, kv_heads, page_size, num_pages,
    DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Semantics: pages[slots[t] // page_size, h, slots[t] % page_size] = (k[t, h], v[t, h]).

    A slot outside the pages is not written.
    """
    row, head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    i = tl.arange(0, WIDTH)
    mask = i < DIM
    at, there = _to_page(k_pages, slots, row, head, kv_heads, page_size, num_pages, i, DIM, DIM)
    key = tl.load(k + row * k_row + head * k_head + i, mask=mask)
    tl.store(at, key.to(k_pages.dtype.element_ty), mask=there)
    at, there = _to_page(v_pages, slots, row, head, kv_heads, page_size, num_pages, i, DIM, DIM)
    value = tl.load(v + row * v_row + head * v_head + i, mask=mask)
    tl.store(at, value.to(v_pages.dtype.element_ty), mask=there)


@triton.jit
def _rotate_and_write(
    qkv, cos, sin, terms, touched, k_pages, v_pages, slots, heads, kv_heads, page_size, num_pages,
    DIM: tl.constexpr, HALF: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Semantics: q, k = rotated by (cos, sin), in place; k and v also go into their pages.

    A head x becomes x · cos + (-right half, left half) · sin, each product and the sum rounded.
    With TERMS, qkv has them added first (v only in its pages).
    """
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    i = tl.arange(0, HALF)
    mask = i < DIM // 2
    start = row * heads * DIM + head * DIM
    left_at, right_at = qkv + start + i, qkv + start + DIM // 2 + i
    left, right = tl.load(left_at, mask=mask), tl.load(right_at, mask=mask)
    narrow = left.dtype
    x = with_terms(left, terms, touched, row, start + i, mask, TERMS)
    y = with_terms(right, terms, touched, row, start + DIM // 2 + i, mask, TERMS)
    first_value = heads - kv_heads
    if head < first_value:
        angle = row * DIM + i
        c, s = tl.load(cos + angle, mask=mask), tl.load(sin + angle, mask=mask)
        d = tl.load(cos + angle + DIM // 2, mask=mask)
        r = tl.load(sin + angle + DIM // 2, mask=mask)
        a = (x * c.to(tl.float32)).to(narrow).to(tl.float32)
        b = (-y * s.to(tl.float32)).to(narrow).to(tl.float32)
        e = (y * d.to(tl.float32)).to(narrow).to(tl.float32)
        f = (x * r.to(tl.float32)).to(narrow).to(tl.float32)
        x, y = (a + b).to(narrow).to(tl.float32), (e + f).to(narrow).to(tl.float32)
        tl.store(left_at, x.to(narrow), mask=mask)
        tl.store(right_at, y.to(narrow), mask=mask)
    if head >= first_value - kv_heads:
        pages = v_pages if head >= first_value else k_pages
        kept = (head - (first_value - kv_heads)) % kv_heads
        at, there = _to_page(
            pages, slots, row, kept, kv_heads, page_size, num_pages, i, DIM, DIM // 2
        )
        tl.store(at, x.to(pages.dtype.element_ty), mask=there)
        tl.store(at + DIM // 2, y.to(pages.dtype.element_ty), mask=there)


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """See `gossamer.kernels.attention.write_kv`."""
    require("k", k)
    require("v", v, like=k)
    num_pages, kv_heads, page_size, dim = k_pages.shape
    launch(
        _write_kv, len(k) * kv_heads, k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        k_pages, v_pages, slots, kv_heads, page_size, num_pages, num_warps=1,
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
        _rotate_and_write, len(qkv) * heads, qkv, cos.contiguous(), sin.contiguous(),
        *arguments(terms, qkv), k_pages, v_pages, slots, heads, kv_heads, page_size, num_pages,
        num_warps=1, DIM=dim, HALF=triton.next_power_of_2(dim // 2), TERMS=terms is not None,
    )  # fmt: skip


def _variants(dtype: str) -> tuple[Variant, ...]:
    value = f"*{dtype}:16"
    pages = {"k_pages": value, "v_pages": value, "slots": "*i64:16"}
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
            {"DIM": 128, "HALF": 64, "TERMS": True},
            num_warps=1,
            needs_load_bits=32,
        ),
    )  # fmt: skip


VARIANTS = tuple(variant for dtype in ("bf16", "fp16", "fp32") for variant in _variants(dtype))
