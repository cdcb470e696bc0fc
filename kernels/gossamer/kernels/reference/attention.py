"""What paged attention means, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.terms import Terms


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """See `gossamer.kernels.attention.paged_attention`. Any float dtype; softmax in fp32."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    group, page_size = q.shape[1] // k_pages.shape[1], k_pages.shape[3]
    starts = query_start.tolist()
    for i, context in enumerate(context_len.tolist()):
        rows = slice(starts[i], starts[i + 1])
        at = torch.arange(context - (rows.stop - rows.start), context, device=q.device)[:, None]
        # Pages that no row of this sequence may look at can belong to somebody else: never read.
        oldest = 0 if sliding_window is None else max(0, context - len(at) - sliding_window + 1)
        first = oldest // page_size
        pages = page_table[i, first : -(-context // page_size)].long()
        seen = slice(oldest - first * page_size, context - first * page_size)
        # [pages, Hkv, D, page] and [pages, Hkv, page, D] -> [Hq, seen, D]
        k = k_pages[pages].permute(1, 0, 3, 2).flatten(1, 2)[:, seen].float()
        v = v_pages[pages].permute(1, 0, 2, 3).flatten(1, 2)[:, seen, : q.shape[2]].float()
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = (q[rows].transpose(0, 1).float() @ k.mT) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        key = torch.arange(oldest, context, device=q.device)[None, :]
        hidden = key > at
        if sliding_window is not None:
            hidden |= key <= at - sliding_window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[rows] = (weights @ v).transpose(0, 1).to(q.dtype)
    return out


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """See `gossamer.kernels.attention.write_kv`."""
    page, offset = slots // k_pages.shape[3], slots % k_pages.shape[3]
    k_pages[page, :, :, offset] = k.to(k_pages.dtype)
    v_pages[page, :, offset, : v.shape[2]] = v.to(v_pages.dtype)


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
    if terms is not None:
        qkv.copy_(terms.added_to(qkv))
    kv_heads, head_dim = k_pages.shape[1:3]
    heads = qkv.view(len(qkv), -1, head_dim)
    rotated = heads[:, :-kv_heads]
    left, right = rotated.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    rotated.copy_(rotated * cos[:, None] + turned * sin[:, None])
    write_kv(rotated[:, -kv_heads:], heads[:, -kv_heads:], k_pages, v_pages, slots)
