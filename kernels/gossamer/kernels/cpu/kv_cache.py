"""Writing a step's keys and values into the pages, and rotating them before."""

from __future__ import annotations

from torch import Tensor

from gossamer.kernels.cpu.checks import require_contiguous, require_fp32
from gossamer.kernels.cpu.parallel import (
    FAILED,
    FIELDS,
    TICKET,
    Kernel,
    counted,
    max_threads,
    subroutine,
)
from gossamer.kernels.cpu.simd import (
    fetch_add,
    load_f32,
    load_i64,
    prefetch,
    store_f32,
    store_i64,
    tile_add,
    tile_load,
    tile_mul,
    tile_store,
    tile_sub,
)
from gossamer.kernels.errors import IndexRangeError
from gossamer.kernels.layout import LANES

#: Tokens that a thread draws at once.
TOKENS_AT_ONCE = 4
#: Below this many rows a second thread costs more than it brings.
SERIAL_ROWS = 64

# Descriptor, byte offsets; from COS on for `rotate_and_write` only.
(K, K_ROW, K_HEAD, V, V_ROW, V_HEAD, SLOTS, TOKENS, KV_HEADS, HEAD_DIM,
 PADDED_DIM, PAGE_SIZE, SLOT_LIMIT, K_PAGES, V_PAGES, COS, SIN, ANGLE_ROW, Q,
 Q_HEADS) = range(FIELDS, FIELDS + 20 * 8, 8)  # fmt: skip


@subroutine
def _place(d: int, t: int, head: int) -> tuple[int, int]:
    """Addresses of a token's key (its first number) and value; (0, 0): its slot is outside."""
    slot, size = load_i64(load_i64(d + SLOTS) + 8 * t), load_i64(d + PAGE_SIZE)
    if slot < 0 or slot >= load_i64(d + SLOT_LIMIT):
        return 0, 0
    plane = (slot // size) * load_i64(d + KV_HEADS) + head
    keys = load_i64(d + K_PAGES) + 4 * (plane * load_i64(d + HEAD_DIM) * size + slot % size)
    padded = load_i64(d + PADDED_DIM)
    return keys, load_i64(d + V_PAGES) + 4 * padded * (plane * size + slot % size)


@subroutine
def _ask_for(d: int, first: int, end: int) -> None:
    """Asks for the lines that tokens are about to write. A key's numbers lie in a line each, which
    the store buffer would wait for one after the other: 16 tokens of 3 heads of 64 take 215 µs
    without this in the midst of a step."""
    step = 4 * load_i64(d + PAGE_SIZE)
    for t in range(first, end):
        for head in range(load_i64(d + KV_HEADS)):
            keys, values = _place(d, t, head)
            for i in range(load_i64(d + HEAD_DIM)):
                prefetch(keys + step * i)
            for i in range(0, load_i64(d + HEAD_DIM), LANES):
                prefetch(values + 4 * i)


@subroutine
def _store(d: int, t: int) -> None:
    """Writes a token's keys and values."""
    head_dim, step = load_i64(d + HEAD_DIM), 4 * load_i64(d + PAGE_SIZE)
    for head in range(load_i64(d + KV_HEADS)):
        keys, values = _place(d, t, head)
        if keys == 0:
            store_i64(d + FAILED, 1)
            return
        k = load_i64(d + K) + t * load_i64(d + K_ROW) + head * load_i64(d + K_HEAD)
        v = load_i64(d + V) + t * load_i64(d + V_ROW) + head * load_i64(d + V_HEAD)
        for i in range(head_dim):
            store_f32(keys + step * i, load_f32(k + 4 * i))
            store_f32(values + 4 * i, load_f32(v + 4 * i))


@subroutine
def _rotate(x: int, cos: int, sin: int, half: int) -> None:
    """x = x * cos + (-right half of x, left half of x) * sin, in place."""
    far, whole = 4 * half, half // LANES * LANES
    for i in range(0, 4 * whole, 4 * LANES):
        left, right = tile_load(1, 1, LANES, x + i, 0), tile_load(1, 1, LANES, x + far + i, 0)
        a = tile_mul(left, tile_load(1, 1, LANES, cos + i, 0))
        b = tile_mul(right, tile_load(1, 1, LANES, sin + i, 0))
        c = tile_mul(right, tile_load(1, 1, LANES, cos + far + i, 0))
        e = tile_mul(left, tile_load(1, 1, LANES, sin + far + i, 0))
        tile_store(tile_sub(a, b), 1, x + i, 0)
        tile_store(tile_add(c, e), 1, x + far + i, 0)
    for i in range(4 * whole, far, 4):
        one, other = load_f32(x + i), load_f32(x + far + i)
        store_f32(x + i, one * load_f32(cos + i) - other * load_f32(sin + i))
        store_f32(x + far + i, other * load_f32(cos + far + i) + one * load_f32(sin + far + i))


@Kernel
def _write(d: int) -> None:
    """Draws tokens and writes their keys and values until there are none."""
    tokens = load_i64(d + TOKENS)
    first = fetch_add(d + TICKET, TOKENS_AT_ONCE)
    while first < tokens:
        end = min(first + TOKENS_AT_ONCE, tokens)
        _ask_for(d, first, end)
        for t in range(first, end):
            _store(d, t)
        first = fetch_add(d + TICKET, TOKENS_AT_ONCE)


@Kernel
def _rotate_and_write(d: int) -> None:
    """Draws tokens, rotates their queries and keys, and writes keys and values."""
    tokens, head_dim = load_i64(d + TOKENS), load_i64(d + HEAD_DIM)
    first = fetch_add(d + TICKET, TOKENS_AT_ONCE)
    while first < tokens:
        end = min(first + TOKENS_AT_ONCE, tokens)
        _ask_for(d, first, end)
        for t in range(first, end):
            angles = t * load_i64(d + ANGLE_ROW)
            q = load_i64(d + Q) + t * load_i64(d + K_ROW)
            for head in range(load_i64(d + Q_HEADS) + load_i64(d + KV_HEADS)):
                _rotate(q + 4 * head_dim * head, load_i64(d + COS) + angles,
                        load_i64(d + SIN) + angles, head_dim // 2)  # fmt: skip
            _store(d, t)
        first = fetch_add(d + TICKET, TOKENS_AT_ONCE)


KERNELS = (_write, _rotate_and_write)


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """See `gossamer.kernels.attention.write_kv`."""
    require_fp32(("k", k), ("v", v))
    _launch(_write, k, v, k_pages, v_pages, slots, (0, 0, 0, 0, 0))


def rotate_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    _terms: None,
) -> None:
    """See `gossamer.kernels.attention.rotate_and_write`."""
    require_fp32(("qkv", qkv), ("cos", cos), ("sin", sin))
    require_contiguous(cos=cos, sin=sin)
    kv_heads, head_dim = k_pages.shape[1:3]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    queries = heads.shape[1] - 2 * kv_heads
    k, v = heads[:, queries : queries + kv_heads], heads[:, queries + kv_heads :]
    angles = (cos.data_ptr(), sin.data_ptr(), 4 * head_dim, qkv.data_ptr(), queries)
    _launch(_rotate_and_write, k, v, k_pages, v_pages, slots, angles)


def _launch(
    kernel: Kernel, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor,
    angles: tuple[int, int, int, int, int],
) -> None:  # fmt: skip
    require_fp32(("k_pages", k_pages), ("v_pages", v_pages))
    require_contiguous(k_pages=k_pages, v_pages=v_pages)
    pages, kv_heads, head_dim, page_size = k_pages.shape
    tokens, slots = slots.shape[0], slots.contiguous()
    d = counted(
        (k.data_ptr(), 4 * k.stride(0), 4 * k.stride(1), v.data_ptr(), 4 * v.stride(0),
         4 * v.stride(1), slots.data_ptr(), tokens, kv_heads, head_dim, v_pages.shape[3],
         page_size, pages * page_size, k_pages.data_ptr(), v_pages.data_ptr(), *angles)
    )  # fmt: skip
    kernel.launch(d, 1 if tokens < SERIAL_ROWS else max_threads())
    if d[FAILED // 8]:
        raise IndexRangeError("slots", pages * page_size)
