"""The base's products against float64, and the freedom of a row from its neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.kernels import Backend, ShapeError, linear
from gossamer.kernels.cpu import linear as cpu
from gossamer.kernels.reference import linear as library
from gossamer.kernels.tolerances import agrees
from tests.kernels.cases import HOST_BACKENDS, generator

ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 24, 25, 40)
#: (out, in): SmolLM2's, one vector wide, no multiple of anything, a vocabulary that is none.
SHAPES = [(576, 576), (3072, 576), (576, 1536), (16, 7), (48, 33), (431, 123), (3, 5), (1007, 64)]


@pytest.fixture(autouse=True)
def _on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_wide_vectors", lambda: True)


def case(rows: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    g = generator(rows)
    return torch.randn(rows, shape[1], generator=g), torch.randn(shape, generator=g)


def stored(weight: Tensor, transposed: bool) -> Tensor:
    return weight.t().contiguous() if transposed else weight


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_any_number_of_rows(
    shape: tuple[int, int], transposed: bool, backend: Backend
) -> None:
    for rows in ROWS:
        x, weight = case(rows, shape)
        y = linear(x, stored(weight, transposed), transposed, backend)
        wanted = x.double() @ weight.double().t()
        assert y.shape == (rows, shape[0])
        assert y.is_contiguous()
        assert agrees(y, wanted)
        wrong = weight.clone()
        wrong[-1, -1] += 1.0  # the last entry counts
        assert not agrees(linear(x, stored(wrong, transposed), transposed, backend), wanted)


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("transposed", [True, False])
def test_a_bias(transposed: bool, backend: Backend) -> None:
    bias = torch.randn(48, generator=generator(7))
    for rows in ROWS:
        x, weight = case(rows, (48, 33))
        wanted = x.double() @ weight.double().t() + bias
        w = stored(weight, transposed)
        assert agrees(linear(x, w, transposed, backend, bias), wanted)
        assert not agrees(linear(x, w, transposed, backend, bias.flip(0)), wanted)
    for bad in (bias[1:], bias.double()):
        with pytest.raises(ShapeError, match="bias"):
            linear(x, w, transposed, backend, bad)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_does_not_depend_on_its_neighbours(transposed: bool, threads: int) -> None:
    least, most = (1, cpu.MOST_ROWS) if transposed else (cpu.ROWS_OUT_IN[0], cpu.ROWS_OUT_IN[-1])
    x, weight = case(most, (1040, 200))
    before = torch.get_num_threads()
    try:
        whole = linear(x, stored(weight, transposed), transposed)
        torch.set_num_threads(threads)
        for rows in range(least, most):
            some = linear(x[most - rows :], stored(weight, transposed), transposed)
            assert torch.equal(some, whole[most - rows :])
    finally:
        torch.set_num_threads(before)


def test_the_kernel_runs_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bool]] = []

    def counted(x: Tensor, weight: Tensor, transposed: bool, _bias: None) -> Tensor:
        calls.append((len(x), transposed))
        return torch.empty(0)

    monkeypatch.setattr(library, "linear", counted)
    for rows in (1, 2, 3, 16, 17, 24, 25):
        x, weight = case(rows, (64, 64))
        linear(x, weight, True)
        linear(x, weight, False)
    assert calls == [
        (1, False),
        (2, False),
        *((n, False) for n in (17, 24)),
        (25, True),
        (25, False),
    ]
    calls.clear()
    x, weight = case(8, (64, 64))
    linear(x.half(), weight.half(), True)  # another dtype
    linear(x, weight.t(), True)  # not contiguous
    linear(x[:, :24].clone(), case(8, (20, 24))[1].t().contiguous(), True)  # ragged columns
    assert calls == [(8, True), (8, True), (8, True)]
    monkeypatch.setattr(cpu, "_wide_vectors", lambda: False)
    linear(x, weight, True)
    assert calls[-1] == (8, True)
    assert len(calls) == 4


def test_inputs_that_are_not_contiguous() -> None:
    x, weight = case(8, (64, 96))
    strided = torch.randn(8, 192)[:, ::2]
    strided.copy_(x)
    for transposed in (True, False):
        assert torch.equal(
            linear(strided, stored(weight, transposed), transposed),
            linear(x, stored(weight, transposed), transposed),
        )


@pytest.mark.parametrize(
    ("x", "weight", "transposed"),
    [
        ((4, 5), (6, 4), False),
        ((4, 5), (6, 5), True),
        ((5,), (6, 5), False),
        ((2, 4, 5), (6, 5), False),
    ],
)
def test_shapes_that_do_not_fit(
    x: tuple[int, ...], weight: tuple[int, ...], transposed: bool
) -> None:
    with pytest.raises(ShapeError):
        linear(torch.zeros(x), torch.zeros(weight), transposed)
