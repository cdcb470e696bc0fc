from __future__ import annotations

import pytest
import torch

from gossamer.kernels import Backend, Piece, apply
from gossamer.kernels.tolerances import agrees
from tests.kernels.apply_checks import WORKLOADS, check_exact, check_independent, check_masked
from tests.kernels.cases import (
    HOST_BACKENDS,
    SHAPES,
    bound,
    dense,
    element_piece,
    expected,
    generator,
    plan_of,
    same_bits,
)


def sparse(rows: int, columns: int, g: torch.Generator, offset: int, projection: int) -> Piece:
    density = (0.0005, 0.01, 0.1)[int(torch.randint(3, (1,), generator=g))]
    return element_piece(rows, columns, density, g, offset, projection)


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 13, 64])
def test_every_composition_of_a_step(rows: int, workload: str) -> None:
    check_exact(sparse, (431, 123), [*WORKLOADS[workload](rows), (1,)], "cpu", seed=rows)


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, int], backend: Backend) -> None:
    check_exact(sparse, shape, [(0,), (), (1, 0), (0,), *[(3,)] * 5, (2,)], backend)


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_dense_rows_and_a_row_of_every_length(rows: int) -> None:
    # One row each of 0, 1, 2, ... entries: every slice is ragged.
    mask = torch.ones(70, 70).tril(-1)
    positions = mask.flatten().nonzero().flatten()
    piece = Piece("element", 0, 3, 70, 1, positions, torch.randn(len(positions)))
    x, y, weights = torch.randn(rows, 70), torch.randn(rows, 75), torch.randn(rows, 1, 1)
    want = expected(
        y, x, [dense([piece], (75, 70))], [(0,)] * rows, weights, torch.zeros(75, dtype=torch.int64)
    )
    apply(y, x, bound([[piece]], (75, 70)), plan_of([(0,)] * rows), weights)
    assert agrees(y, want)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    check_independent(sparse, (431, 123))
    check_independent(lambda r, c, g, o, p: element_piece(r, c, 0.02, g, o, p), (1040, 64))


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_a_weight_of_zero_masks(backend: Backend) -> None:
    check_masked(sparse, (123, 431), backend)


def test_empty_deltas_change_nothing() -> None:
    empty = element_piece(42, 6, 0.0, generator(0))
    y = torch.randn(5, 42)
    every: list[list[list[Piece] | None]] = [[[empty]], [[]], [None]]
    for residents in every:
        got = y.clone()
        apply(
            got,
            torch.randn(5, 6),
            bound(residents, (42, 6)),
            plan_of([(0,)] * 5),
            torch.ones(5, 1, 1),
        )
        assert torch.equal(got, y)


def test_views_with_strides_are_served_in_place() -> None:
    g = generator(1)
    piece = element_piece(42, 6, 0.3, g)
    wide_x, wide_y = torch.randn(4, 20, generator=g), torch.randn(4, 60, generator=g)
    weights = torch.randn(1, 4, 2, generator=g).permute(1, 2, 0)  # strides of no contiguous tensor
    want = wide_y.clone()
    want[:, 9:51] = expected(
        wide_y[:, 9:51], wide_x[:, 3:9], [dense([piece], (42, 6))] * 2, [(0, 1)] * 4, weights,
        torch.zeros(42, dtype=torch.int64),
    ).float()  # fmt: skip
    got = wide_y.clone()
    apply(
        got[:, 9:51], wide_x[:, 3:9], bound([[piece]] * 2, (42, 6)), plan_of([(0, 1)] * 4), weights
    )
    assert agrees(got, want)
    assert same_bits(got[:, :9], wide_y[:, :9])
    assert same_bits(got[:, 51:], wide_y[:, 51:])


def test_half_precision_goes_through_the_reference() -> None:
    g = generator(2)
    piece = element_piece(42, 123, 0.1, g)
    x = torch.randn(3, 123, generator=g).bfloat16()
    y = torch.randn(3, 42, generator=g).bfloat16()
    want = expected(
        y, x, [dense([piece], (42, 123))], [(0,)] * 3, torch.ones(3, 1, 1),
        torch.zeros(42, dtype=torch.int64),
    )  # fmt: skip
    apply(y, x, bound([[piece]], (42, 123)), plan_of([(0,)] * 3), torch.ones(3, 1, 1), "reference")
    assert agrees(y, want)
