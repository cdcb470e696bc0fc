"""What lies between the products of a layer: norms, gates, rotation, attention, with terms."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from gossamer.kernels import (
    Terms,
    fused_add_rms_norm,
    new_kv_pages,
    paged_attention,
    rotate_and_write,
    silu_and_mul,
)

_PAGE = 16


def consumers(bench: Bench) -> None:
    """Those that add terms, against themselves without."""
    for rows, with_terms in bench.cases(itertools.product(bench.setting.rows, (False, True))):
        _norm(bench, rows, with_terms)
        _gate(bench, rows, with_terms)
        _rotate(bench, rows, with_terms)


def _random(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.setting.device).to(bench.setting.dtype)


def _terms(bench: Bench, rows: int, width: int, wanted: bool) -> Terms | None:
    if not wanted:
        return None
    device = bench.setting.device
    touched = torch.ones(rows, dtype=torch.int64, device=device)
    return Terms(torch.randn(rows, width, device=device), touched)


def _add(bench: Bench, what: str, taken: float, rows: int, nbytes: float, terms: bool) -> None:
    bench.record.add(
        "consumer", f"{what}{' with terms' * terms}", taken, "ms", model=bench.setting.model.name,
        rows=rows, nbytes=nbytes,
    )  # fmt: skip


def _norm(bench: Bench, rows: int, with_terms: bool) -> None:
    hidden = bench.setting.model.hidden
    residual, x = _random(bench, rows, hidden), _random(bench, rows, hidden)
    weight, terms = _random(bench, hidden), _terms(bench, rows, hidden, with_terms)
    taken = bench.timer.launched(
        lambda: fused_add_rms_norm(residual, x, weight, 1e-5, "triton", terms)
    )
    nbytes = 4 * x.nbytes + (terms.values.nbytes if terms else 0)
    _add(bench, "fused_add_rms_norm", taken, rows, nbytes, with_terms)


def _gate(bench: Bench, rows: int, with_terms: bool) -> None:
    width = 2 * bench.setting.model.intermediate
    gate_up, terms = _random(bench, rows, width), _terms(bench, rows, width, with_terms)
    taken = bench.timer.launched(lambda: silu_and_mul(gate_up, "triton", terms))
    nbytes = 1.5 * gate_up.nbytes + (terms.values.nbytes if terms else 0)
    _add(bench, "silu_and_mul", taken, rows, nbytes, with_terms)


def _rotate(bench: Bench, rows: int, with_terms: bool) -> None:
    setting, model = bench.setting, bench.setting.model
    pages = new_kv_pages(
        rows, _PAGE, model.kv_heads, model.head_size, setting.dtype, setting.device, "triton"
    )
    width = (model.heads + 2 * model.kv_heads) * model.head_size
    qkv, terms = _random(bench, rows, width), _terms(bench, rows, width, with_terms)
    cos, sin = _random(bench, rows, model.head_size), _random(bench, rows, model.head_size)
    slots = _PAGE * torch.arange(rows, device=setting.device)

    def rotate() -> Tensor:
        rotate_and_write(qkv, cos, sin, *pages, slots, "triton", terms)
        return qkv

    taken = bench.timer.launched(rotate)
    nbytes = 2.5 * qkv.nbytes + (terms.values.nbytes if terms else 0)
    _add(bench, "rotate_and_write", taken, rows, nbytes, with_terms)


def attention(bench: Bench) -> None:
    """One layer's attention of decoding rows, by context."""
    setting, model = bench.setting, bench.setting.model
    for rows, context in bench.cases(itertools.product(setting.rows, setting.contexts)):
        each = -(-context // _PAGE)
        k_pages, v_pages = new_kv_pages(
            rows * each, _PAGE, model.kv_heads, model.head_size, setting.dtype, setting.device,
            "triton",
        )  # fmt: skip
        k_pages.normal_()
        v_pages.normal_()
        # Scattered, as they are after a while.
        order = torch.randperm(rows * each, generator=torch.Generator().manual_seed(0))
        table = order.view(rows, each).to(setting.device, torch.int32)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=setting.device)
        lengths = torch.full((rows,), context, dtype=torch.int32, device=setting.device)
        q = _random(bench, rows, model.heads, model.head_size)

        def attend(
            q: Tensor = q, k: Tensor = k_pages, v: Tensor = v_pages, table: Tensor = table,
            starts: Tensor = starts, lengths: Tensor = lengths,
        ) -> Tensor:  # fmt: skip
            scale = q.shape[2] ** -0.5
            return paged_attention(q, k, v, table, starts, lengths, scale, backend="triton")

        taken = bench.timer.launched(attend)
        nbytes = 2 * rows * context * model.kv_heads * model.head_size * setting.dtype.itemsize
        bench.record.add(
            "attention", "decode", taken, "ms", model=model.name, rows=rows, context=context,
            nbytes=nbytes + 2 * q.nbytes,
        )  # fmt: skip
