"""Rotating queries and keys in place, and writing keys and values behind that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.kernels import (
    Backend,
    IndexRangeError,
    ShapeError,
    new_kv_pages,
    rotate_and_write,
    write_kv,
)
from gossamer.kernels.tolerances import agrees
from tests.kernels.cases import HOST_BACKENDS, generator, same_bits

#: (query heads, kv heads, head dim): SmolLM2's, one head each, halves that are no whole vectors.
HEADS = [(9, 3, 64), (1, 1, 2), (4, 2, 80), (2, 1, 6), (8, 1, 128)]


def case(rows: int, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A product of q, k and v, its angles, and slots in 9 pages of 16."""
    g = generator(rows)
    qkv = torch.randn(rows, (heads[0] + 2 * heads[1]) * heads[2], generator=g)
    cos, sin = torch.randn(2, rows, heads[2], generator=g).unbind()
    return qkv, cos, sin, torch.randperm(9 * 16, generator=g)[:rows]


def pages(heads: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    k, v = new_kv_pages(9, 16, heads[1], heads[2])
    return k.fill_(7.0), v.fill_(7.0)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] as transformers' `apply_rotary_pos_emb` rotates it."""
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rows", [1, 16, 130])
def test_what_is_rotated_and_what_is_stored(
    rows: int, heads: tuple[int, int, int], backend: Backend
) -> None:
    qkv, cos, sin, slots = case(rows, heads)
    before = qkv.clone().view(rows, -1, heads[2])
    k_pages, v_pages = pages(heads)
    rotate_and_write(qkv, cos, sin, k_pages, v_pages, slots, backend)
    after = qkv.view(rows, -1, heads[2])
    wanted = rotated(before.double(), cos.double(), sin.double())
    assert agrees(after[:, : -heads[1]], wanted[:, : -heads[1]])
    assert torch.equal(after[:, -heads[1] :], before[:, -heads[1] :])
    assert not agrees(after[:, : -heads[1]], rotated(before, sin, cos)[:, : -heads[1]])
    plain = pages(heads)
    write_kv(
        after[:, heads[0] : -heads[1]], after[:, -heads[1] :], *plain, slots, backend="reference"
    )
    assert same_bits(k_pages, plain[0])
    assert same_bits(v_pages, plain[1])


def test_threads_and_neighbours_change_nothing() -> None:
    heads = (9, 3, 64)
    qkv, cos, sin, slots = case(130, heads)
    one, several = qkv[17:18].clone(), qkv.clone()
    first, second = pages(heads), pages(heads)
    rotate_and_write(one, cos[17:18], sin[17:18], *first, slots[17:18])
    rotate_and_write(several, cos, sin, *second, slots)
    assert torch.equal(one, several[17:18])


def test_a_slot_outside_is_noticed_and_nothing_else_is_written() -> None:
    heads = (2, 1, 64)
    for outside in (-1, 9 * 16, 2**62):
        qkv, cos, sin, slots = case(4, heads)
        slots[2] = outside
        k_pages, v_pages = pages(heads)
        with pytest.raises(IndexRangeError):
            rotate_and_write(qkv, cos, sin, k_pages, v_pages, slots)
        assert int((k_pages != 7.0).sum()) == 3 * 64


def test_what_does_not_fit() -> None:
    heads = (2, 1, 64)
    qkv, cos, sin, slots = case(4, heads)
    for bad in (
        (qkv[:, :-1], cos, sin, slots),
        (qkv[:, : 2 * 64], cos, sin, slots),
        (qkv[:, ::2], cos, sin, slots),
        (qkv, cos[:3], sin, slots),
        (qkv, cos, sin[:, :32], slots),
        (qkv, cos, sin, slots[:3]),
        (qkv, cos, sin, slots.int()),
        (qkv.double(), cos, sin, slots),
    ):
        with pytest.raises(ShapeError):
            rotate_and_write(*bad[:3], *pages(heads), bad[3])
