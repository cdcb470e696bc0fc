"""Writing a step's keys and values into the pages."""

from __future__ import annotations

from torch import Tensor

from gossamer.kernels.cpu.checks import require_contiguous, require_fp32
from gossamer.kernels.cpu.parallel import Kernel, descriptor, max_threads
from gossamer.kernels.cpu.simd import fetch_add, load_f32, load_i64, store_f32, store_i64
from gossamer.kernels.errors import IndexRangeError

#: Tokens that a thread draws at once.
TOKENS_AT_ONCE = 16
#: Below this many rows a second thread costs more than it brings.
SERIAL_ROWS = 64

# Descriptor of `write_kv`, byte offsets.
(TICKET, FAILED, K, K_ROW, K_HEAD, V, V_ROW, V_HEAD, SLOTS, TOKENS, KV_HEADS, HEAD_DIM,
 PADDED_DIM, PAGE_SIZE, SLOT_LIMIT, K_PAGES,
 V_PAGES) = range(0, 17 * 8, 8)  # fmt: skip


@Kernel
def _write(d: int) -> None:
    """Draws tokens and writes their keys and values until there are none."""
    head_dim, padded = load_i64(d + HEAD_DIM), load_i64(d + PADDED_DIM)
    size, kv_heads = load_i64(d + PAGE_SIZE), load_i64(d + KV_HEADS)
    tokens = load_i64(d + TOKENS)
    first = fetch_add(d + TICKET, TOKENS_AT_ONCE)
    while first < tokens:
        for t in range(first, min(first + TOKENS_AT_ONCE, tokens)):
            slot = load_i64(load_i64(d + SLOTS) + 8 * t)
            if slot < 0 or slot >= load_i64(d + SLOT_LIMIT):
                store_i64(d + FAILED, 1)
                continue
            for head in range(kv_heads):
                plane = (slot // size) * kv_heads + head
                k = load_i64(d + K) + t * load_i64(d + K_ROW) + head * load_i64(d + K_HEAD)
                v = load_i64(d + V) + t * load_i64(d + V_ROW) + head * load_i64(d + V_HEAD)
                keys = load_i64(d + K_PAGES) + 4 * (plane * head_dim * size + slot % size)
                values = load_i64(d + V_PAGES) + 4 * padded * (plane * size + slot % size)
                for i in range(head_dim):
                    store_f32(keys + 4 * size * i, load_f32(k + 4 * i))
                    store_f32(values + 4 * i, load_f32(v + 4 * i))
        first = fetch_add(d + TICKET, TOKENS_AT_ONCE)


KERNELS = (_write,)


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """See `gossamer.kernels.attention.write_kv`."""
    require_fp32(("k", k), ("v", v), ("k_pages", k_pages), ("v_pages", v_pages))
    require_contiguous(k_pages=k_pages, v_pages=v_pages)
    pages, kv_heads, head_dim, page_size = k_pages.shape
    slots = slots if slots.is_contiguous() else slots.contiguous()
    d = descriptor(
        (0, 0, k.data_ptr(), 4 * k.stride(0), 4 * k.stride(1), v.data_ptr(), 4 * v.stride(0),
         4 * v.stride(1), slots.data_ptr(), len(slots), kv_heads, head_dim, v_pages.shape[3],
         page_size, pages * page_size, k_pages.data_ptr(), v_pages.data_ptr())
    )  # fmt: skip
    _write.launch(d, 1 if len(slots) < SERIAL_ROWS else max_threads())
    if d[FAILED // 8]:
        raise IndexRangeError("slots", pages * page_size)
