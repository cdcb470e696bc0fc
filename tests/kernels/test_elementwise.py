"""Norms and activations against float64."""

from __future__ import annotations

import pytest
import torch

from gossamer.kernels import (
    Backend,
    ShapeError,
    fused_add_rms_norm,
    rms_norm,
    silu_and_mul,
)
from gossamer.kernels.reference import elementwise as reference
from gossamer.kernels.tolerances import agrees
from tests.kernels.cases import HOST_BACKENDS, generator

#: Rows and width: SmolLM2's, one number, no multiple of a vector, several threads.
SHAPES = [(16, 576), (1, 1), (3, 5), (7, 16), (5, 63), (4, 65), (200, 123), (64, 1536)]


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_root_mean_square_norm(rows: int, width: int, backend: Backend) -> None:
    g = generator(rows)
    x, weight = torch.randn(rows, width, generator=g), torch.randn(width, generator=g)
    wanted = reference.rms_norm(x.double(), weight.double(), 1e-2)
    y = rms_norm(x, weight, 1e-2, backend)
    assert agrees(y, wanted)
    assert y.is_contiguous()
    for row, column in ((0, 0), (rows - 1, width - 1)):
        wrong = x.clone()
        wrong[row, column] += 1.0
        assert not agrees(rms_norm(wrong, weight, 1e-2, backend), wanted)
    assert width == 1 or not agrees(rms_norm(x, weight.flip(0), 1e-2, backend), wanted)
    assert not agrees(rms_norm(x, weight, 2e-2, backend), wanted)


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_a_sum_and_its_norm(rows: int, width: int, backend: Backend) -> None:
    g = generator(rows)
    residual, x = torch.randn(2, rows, width, generator=g).unbind()
    weight = torch.randn(width, generator=g)
    total = residual + x
    y = fused_add_rms_norm(residual, x, weight, 1e-2, backend)
    assert torch.equal(residual, total)
    assert torch.equal(y, rms_norm(total, weight, 1e-2, backend))
    assert agrees(y, reference.rms_norm(total.double(), weight.double(), 1e-2))
    apart = torch.zeros(rows, width + 3)[:, :width]
    assert torch.equal(fused_add_rms_norm(apart, total, weight, 1e-2, backend), y)
    assert torch.equal(apart, total)


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_silu_and_mul(rows: int, width: int, backend: Backend) -> None:
    x = 4 * torch.randn(rows, 2 * width, generator=generator(rows))
    wanted = reference.silu_and_mul(x.double())
    y = silu_and_mul(x, backend)
    assert agrees(y, wanted)
    assert y.is_contiguous()
    assert not agrees(silu_and_mul(x.roll(width, 1), backend), wanted)


@pytest.mark.parametrize("width", [3, 16, 576])
def test_small_and_large_numbers(width: int) -> None:
    x = torch.full((2, 2 * width), 1.0)
    for gate, wanted in ((-200.0, 0.0), (-88.5, -3.3e-37), (200.0, 200.0), (0.0, 0.0)):
        x[:, :width] = gate
        assert torch.allclose(silu_and_mul(x), torch.tensor(wanted), atol=1e-30)
    x[0, 0] = torch.nan
    assert torch.isnan(silu_and_mul(x)[0, 0])
    assert torch.isnan(silu_and_mul(x)).sum() == 1
    tiny, ones = torch.full((1, width), 1e-20), torch.ones(width)
    assert torch.isfinite(rms_norm(torch.zeros(1, width), ones, 1e-5)).all()
    assert agrees(rms_norm(tiny, ones, 1e-5), tiny.double() / 1e-5**0.5)
    x = torch.ones(2, width)
    x[1, -1] = torch.inf
    assert torch.isfinite(rms_norm(x, ones, 1e-5)).all(1).tolist() == [True, False]


def test_rows_that_lie_apart_and_do_not_depend_on_one_another() -> None:
    x = torch.randn(70, 200, generator=generator(1))
    weight = torch.randn(96, generator=generator(2))
    part = x[:, 7:103]
    whole = rms_norm(part, weight, 1e-5)
    assert torch.equal(whole, rms_norm(part.contiguous(), weight, 1e-5))
    assert torch.equal(whole[5:6], rms_norm(part[5:6], weight, 1e-5))
    assert torch.equal(silu_and_mul(part), silu_and_mul(part.contiguous()))
    assert torch.equal(silu_and_mul(part)[9:10], silu_and_mul(part[9:10]))


def test_what_does_not_fit() -> None:
    x, weight = torch.ones(2, 6), torch.ones(6)
    for bad in (x[0], torch.ones(2, 5)):
        with pytest.raises(ShapeError):
            rms_norm(bad, weight, 1e-5)
    for bad in (x[0], torch.ones(2, 5), x.double(), torch.ones(6, 2).t()):
        with pytest.raises(ShapeError):
            silu_and_mul(bad)
    with pytest.raises(ShapeError):
        rms_norm(x.double(), weight, 1e-5)
    for residual, added in ((x, torch.ones(3, 6)), (x, torch.ones(6, 2).t()), (x[0], x[0])):
        with pytest.raises(ShapeError):
            fused_add_rms_norm(residual, added, weight, 1e-5)
    with pytest.raises(ShapeError):
        fused_add_rms_norm(x, x.clone(), torch.ones(5), 1e-5)
