"""Attention over a paged key/value cache, for a ragged step.

A step's rows lie behind one another without padding: the rows of sequence i are
`query_start[i] : query_start[i + 1]`, one row in decode, many in a chunk of a prefill. The keys and
values of the step's own tokens are written into the pages first (`write_kv`), so attention reads
pages only.

The layout of the pages belongs to this file (`kv_page_shapes`). On the CPU keys are stored
transposed inside a page, so that sixteen neighbouring positions are one vector and a score needs no
horizontal sum; values are stored row by row, so that one position's value is a few whole vectors.
On a device ("triton") both are stored row by row, as FlashAttention and FlashInfer read them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.kernels.backends import Backend, implementation
from gossamer.kernels.errors import ShapeError
from gossamer.kernels.terms import Terms, checked

#: Positions per page must be a multiple of this for the CPU backend: one AVX-512 vector of fp32.
PAGE_MULTIPLE = 16


def kv_page_shapes(
    num_pages: int, page_size: int, kv_heads: int, head_dim: int, backend: Backend = "cpu"
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Shapes of one layer's key pages and value pages.

    Args:
        num_pages: pages in the pool.
        page_size: positions per page, a multiple of `PAGE_MULTIPLE`.
        kv_heads: key/value heads.
        head_dim: width of a head. On the CPU, value rows are padded to a multiple of
            `PAGE_MULTIPLE`.
        backend: who reads them; "reference" has the layout of "cpu".

    Returns:
        (num_pages, kv_heads, head_dim, page_size) for the keys and
        (num_pages, kv_heads, page_size, padded head_dim) for the values; "triton":
        (num_pages, kv_heads, page_size, head_dim) for both.

    Raises:
        ShapeError: `page_size` is not a positive multiple of `PAGE_MULTIPLE`.
    """
    if page_size <= 0 or page_size % PAGE_MULTIPLE:
        raise ShapeError("page_size", f"a positive multiple of {PAGE_MULTIPLE}", page_size)
    if backend == "triton":
        shape = (num_pages, kv_heads, page_size, head_dim)
        return shape, shape
    padded = -(-head_dim // PAGE_MULTIPLE) * PAGE_MULTIPLE
    return (num_pages, kv_heads, head_dim, page_size), (num_pages, kv_heads, page_size, padded)


def kv_page_bytes(
    page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, backend: Backend = "cpu"
) -> int:
    """Bytes that one page (keys and values, one layer) occupies."""
    shapes = kv_page_shapes(1, page_size, kv_heads, head_dim, backend)
    return sum(map(math.prod, shapes)) * dtype.itemsize


def new_kv_pages(
    num_pages: int,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: Backend = "cpu",
) -> tuple[Tensor, Tensor]:
    """One layer's key pages and value pages, uninitialised (see `kv_page_shapes`)."""
    k_shape, v_shape = kv_page_shapes(num_pages, page_size, kv_heads, head_dim, backend)
    k_pages = torch.empty(k_shape, dtype=dtype, device=device)
    return k_pages, torch.empty(v_shape, dtype=dtype, device=device)


def framed_kv_pages(
    block: Tensor, layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Key pages and value pages of all layers in one block of memory, for "triton".

    A *frame* holds one page of every layer, keys and values; pages of one layer lie a frame apart.

    Args:
        block: uint8 [frames * bytes of a frame]; what is in a frame that is used for something
            else is never looked at.
    """
    shape = (-1, layers, 2, kv_heads, page_size, head_dim)
    frames = block.view(dtype).view(shape)
    return [(frames[:, layer, 0], frames[:, layer, 1]) for layer in range(layers)]


def write_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    backend: Backend = "cpu",
) -> None:
    """Semantics: pages[slots[t] // page_size] at offset slots[t] % page_size = (k[t], v[t]).

    In place; every other position of the pages keeps its bits. Rows of one call must have distinct
    slots.

    Args:
        k, v: [T, Hkv, D], last dimension contiguous (views into a packed projection are fine).
        k_pages, v_pages: as made by `new_kv_pages`, contiguous.
        slots: int64 [T], page * page_size + offset.
        backend: "triton", "cpu" (fp32 only) or "reference".

    Raises:
        ShapeError: a shape, dtype or stride does not fit.
        IndexRangeError: a slot lies outside the pages ("cpu"; "triton" does not write such a row;
            the other rows are written).
        BackendUnavailableError: see `implementation`.
    """
    _, kv_heads, head_dim, _ = _geometry(k_pages, v_pages, backend)
    tokens = k.shape[0]
    if k.shape != (tokens, kv_heads, head_dim) or v.shape != k.shape:
        raise ShapeError(
            "k and v", f"[T, {kv_heads}, {head_dim}]", (tuple(k.shape), tuple(v.shape))
        )
    _check_slots(slots, tokens)
    implementation(backend, "attention").write_kv(k, v, k_pages, v_pages, slots)


def rotate_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    backend: Backend = "cpu",
    terms: Terms | None = None,
) -> None:
    """Semantics: q, k = rotated by (cos, sin), in place; then `write_kv` of k and v.

    With `terms`, all of `qkv` has them added first, v's in its pages only.

    A row of `qkv` holds the heads of q, then of k, then of v. A head x becomes x · cos +
    (-right half of x, left half of x) · sin, as transformers' `apply_rotary_pos_emb` does.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D], contiguous.
        cos, sin: [T, D], contiguous, each row's angles, in qkv's dtype.
        k_pages, v_pages, slots, backend: as for `write_kv`.
        terms: of the product qkv; "triton" only.

    Raises:
        ShapeError: a shape, dtype or stride does not fit.
        IndexRangeError: as for `write_kv`; queries and keys are rotated.
        BackendUnavailableError: see `implementation`.

    Source: Su et al., RoFormer (2021).
    """
    _, kv_heads, head_dim, _ = _geometry(k_pages, v_pages, backend)
    heads, rest = divmod(qkv.shape[-1], head_dim)
    if qkv.dim() != 2 or rest or heads <= 2 * kv_heads or not qkv.is_contiguous():
        raise ShapeError("qkv", f"[T, (Hq + {2 * kv_heads}) * {head_dim}]", tuple(qkv.shape))
    tokens = qkv.shape[0]
    if head_dim % 2 or cos.shape != (tokens, head_dim) or sin.shape != cos.shape:
        raise ShapeError("cos and sin", f"[{tokens}, {head_dim}]", tuple(cos.shape))
    _check_slots(slots, tokens)
    implementation(backend, "attention").rotate_and_write(
        qkv, cos, sin, k_pages, v_pages, slots, checked(terms, qkv, backend)
    )


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    backend: Backend = "cpu",
) -> Tensor:
    """Semantics: out[t, h] = Σ_s softmax_s(cap(scale · q[t, h] · K_s)) · V_s, s ≤ position of t.

    Row t of sequence i stands at position p = context_len[i] - query_start[i + 1] + t and sees the
    positions s ≤ p, and with a `sliding_window` of w only s > p - w. cap(z) is z, or
    softcap · tanh(z / softcap). Heads are grouped: query head h reads kv head h // (Hq / Hkv).

    A row's result does not depend on its neighbours bit for bit ("cpu"): not on the other
    sequences of the step, not on the size of the chunk it arrives in, not on the number of threads.
    Positions that a row may not see are masked, never multiplied by 0, and pages outside every
    row's view are not read.

    Args:
        q: [T, Hq, D], last dimension contiguous.
        k_pages, v_pages: as made by `new_kv_pages`, contiguous, the step's tokens included.
        page_table: int32 [num_seqs, max_pages], last dimension contiguous; the pages of each
            sequence in order. Entries behind its context are ignored.
        query_start: int32 [num_seqs + 1], contiguous, from 0 to T, not decreasing.
        context_len: int32 [num_seqs], contiguous: each sequence's length including this step.
        scale: usually 1 / sqrt(D).
        sliding_window: w, or None for full attention.
        softcap: cap of the scores, or None.
        backend: "triton", "cpu" (fp32 only) or "reference".

    Returns:
        [T, Hq, D], contiguous, in q's dtype.

    Raises:
        ShapeError: a shape, dtype or stride does not fit.
        IndexRangeError: the page table, the query starts or the context lengths point outside
            their memory ("cpu"; the result is dropped. "triton" reads nothing there).
        BackendUnavailableError: see `implementation`.

    Source: Kwon et al., PagedAttention (2023); the running softmax is that of Milakov and
    Gimelshein (2018).
    """
    _, kv_heads, head_dim, _ = _geometry(k_pages, v_pages, backend)
    if q.ndim != 3 or q.shape[2] != head_dim or q.shape[1] % kv_heads:
        raise ShapeError("q", f"[T, n * {kv_heads}, {head_dim}]", tuple(q.shape))
    sequences = context_len.shape[0]
    if page_table.ndim != 2 or page_table.shape[0] != sequences:
        raise ShapeError("page_table", f"[{sequences}, max_pages]", tuple(page_table.shape))
    if query_start.shape != (sequences + 1,):
        raise ShapeError("query_start", f"[{sequences + 1}]", tuple(query_start.shape))
    out: Tensor = implementation(backend, "attention").paged_attention(
        q,
        k_pages,
        v_pages,
        page_table,
        query_start,
        context_len,
        scale,
        sliding_window,
        softcap,
    )
    return out


def _check_slots(slots: Tensor, tokens: int) -> None:
    if slots.shape != (tokens,) or slots.dtype != torch.int64:
        raise ShapeError("slots", f"int64 [{tokens}]", (slots.dtype, tuple(slots.shape)))


def _geometry(k_pages: Tensor, v_pages: Tensor, backend: Backend) -> tuple[int, int, int, int]:
    """Pages, key/value heads, width of a head, positions per page."""
    if k_pages.ndim != 4:
        raise ShapeError("k_pages", "as made by new_kv_pages", tuple(k_pages.shape))
    pages, kv_heads, head_dim, page_size = k_pages.shape
    if backend == "triton":
        head_dim, page_size = page_size, head_dim
    shapes = (tuple(k_pages.shape), tuple(v_pages.shape))
    if page_size % PAGE_MULTIPLE or shapes != kv_page_shapes(
        pages, page_size, kv_heads, head_dim, backend
    ):
        raise ShapeError("k_pages and v_pages", f"new_kv_pages for {backend!r}", shapes)
    if backend == "triton" and (
        k_pages.stride()[1:] != (page_size * head_dim, head_dim, 1)
        or v_pages.stride() != k_pages.stride()
    ):
        raise ShapeError("k_pages and v_pages", "of contiguous pages", k_pages.stride())
    return pages, kv_heads, head_dim, page_size
