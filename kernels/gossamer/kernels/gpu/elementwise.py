"""What lies between the products of a layer, one program a row.

Each rounds where torch's own operations would, so that a short form equals the long one. The terms
of sparse deltas, computed beside a product, are added here: no launch of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.gpu.launch import TYPE_NAMES, launch, require
from gossamer.kernels.gpu.variant import Variant
from gossamer.kernels.terms import Terms

#: Columns of a gate and up that a program does.
GATE_COLUMNS = 1024


@triton.jit
def with_terms(value, terms, touched, row, at, mask, TERMS: tl.constexpr):
    """Part of a row of a product, in float32, rounded after its terms are added."""
    whole = value.to(tl.float32)
    if TERMS:
        if tl.load(touched + row) != 0:
            whole = (whole + tl.load(terms + at, mask=mask, other=0.0)).to(value.dtype)
            whole = whole.to(tl.float32)
    return whole


@triton.jit
def _rms_norm(
    y, residual, residual_row, x, x_row, terms, touched, weight, width, eps,
    COLUMNS: tl.constexpr, ADD: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Semantics: h[t] = residual[t] + (x[t] + terms[t]) with ADD, which also stores it; else x[t].

    Then y[t] = weight · round(h[t] / sqrt(mean(h[t]²) + eps)).
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, COLUMNS)
    mask = i < width
    h = tl.load(x + row * x_row + i, mask=mask, other=0.0)
    wide = with_terms(h, terms, touched, row, row * width + i, mask, TERMS)
    if ADD:
        before = tl.load(residual + row * residual_row + i, mask=mask, other=0.0)
        total = (before.to(tl.float32) + wide).to(h.dtype)
        tl.store(residual + row * residual_row + i, total, mask=mask)
        wide = total.to(tl.float32)
    mean = tl.sum(wide * wide, axis=0) / width
    normed = (wide * tl.rsqrt(mean + eps)).to(h.dtype).to(tl.float32)
    scaled = normed * tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * width + i, scaled.to(h.dtype), mask=mask)


@triton.jit
def _silu_and_mul(
    y, gate_up, gate_up_row, terms, touched, width, COLUMNS: tl.constexpr, TERMS: tl.constexpr
):
    """Semantics: y[t, i] = round(silu(g[t, i])) · u[t, i], g and u the halves of a row."""
    blocks = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask = i < width
    at = gate_up + row * gate_up_row + i
    gate, up = tl.load(at, mask=mask, other=0.0), tl.load(at + width, mask=mask, other=0.0)
    term = row * 2 * width + i
    g = with_terms(gate, terms, touched, row, term, mask, TERMS)
    u = with_terms(up, terms, touched, row, term + width, mask, TERMS)
    silu = (g / (1 + tl.exp(-g))).to(gate.dtype).to(tl.float32)
    tl.store(y + row * width + i, (silu * u).to(gate.dtype), mask=mask)


def _norm(
    residual: Tensor | None, x: Tensor, weight: Tensor, eps: float, terms: Terms | None
) -> Tensor:
    require("x", x)
    require("weight", weight, like=x)
    y = x.new_empty(x.shape)
    columns = triton.next_power_of_2(x.shape[1])
    kept = x if residual is None else residual
    launch(
        _rms_norm, len(x), y, kept, kept.stride(0), x, x.stride(0), *arguments(terms, x), weight,
        x.shape[1], eps, num_warps=warps(columns), COLUMNS=columns, ADD=residual is not None,
        TERMS=terms is not None,
    )  # fmt: skip
    return y


def warps(columns: int) -> int:
    """Sixteen columns a thread, within what a program may have."""
    return min(max(columns // 512, 1), 16)


def arguments(terms: Terms | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Terms as a kernel takes them; anything where there are none."""
    return (x, x) if terms is None else (terms.values, terms.touched)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `gossamer.kernels.elementwise.rms_norm`."""
    return _norm(None, x, weight, eps, None)


def fused_add_rms_norm(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, terms: Terms | None
) -> Tensor:
    """See `gossamer.kernels.elementwise.fused_add_rms_norm`."""
    require("residual", residual, like=x)
    return _norm(residual, x, weight, eps, terms)


def silu_and_mul(gate_up: Tensor, terms: Terms | None) -> Tensor:
    """See `gossamer.kernels.elementwise.silu_and_mul`."""
    require("gate_up", gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, width)
    launch(
        _silu_and_mul, rows * -(-width // GATE_COLUMNS), y, gate_up, gate_up.stride(0),
        *arguments(terms, gate_up), width, COLUMNS=GATE_COLUMNS, TERMS=terms is not None,
    )  # fmt: skip
    return y


def _variants(dtype: str, terms: bool) -> tuple[Variant, ...]:
    value, name = f"*{dtype}:16", f"{dtype}{'-terms' * terms}"
    beside = {"terms": "*fp32:16" if terms else value, "touched": "*i64:16" if terms else value}
    return (
        Variant(
            f"fused_add_rms_norm-{name}",
            _rms_norm,
            {"y": value, "residual": value, "residual_row": "i32:16", "x": value,
             "x_row": "i32:16", **beside, "weight": value, "width": "i32:16", "eps": "fp32"},
            {"COLUMNS": 4096, "ADD": True, "TERMS": terms},
            num_warps=warps(4096),
            needs_load_bits=128,
        ),
        Variant(
            f"silu_and_mul-{name}",
            _silu_and_mul,
            {"y": value, "gate_up": value, "gate_up_row": "i32:16", **beside, "width": "i32:16"},
            {"COLUMNS": GATE_COLUMNS, "TERMS": terms},
            needs_load_bits=128,
        ),
    )  # fmt: skip


VARIANTS = tuple(
    variant
    for dtype in TYPE_NAMES.values()
    if not dtype.startswith("i")
    for terms in (False, True)
    for variant in _variants(dtype, terms)
)
