from __future__ import annotations

import pytest
import torch

from gossamer.kernels import Backend, Piece
from tests.kernels.apply_checks import WORKLOADS, check_exact, check_independent, check_masked
from tests.kernels.cases import HOST_BACKENDS, SHAPES, block_piece, element_piece


def tiles(rows: int, columns: int, g: torch.Generator, offset: int, projection: int) -> Piece:
    side = (8, 16, 32, 48)[int(torch.randint(4, (1,), generator=g))]
    return block_piece(rows, columns, 0.3, side, g, offset, projection)


def either(rows: int, columns: int, g: torch.Generator, offset: int, projection: int) -> Piece:
    if int(torch.randint(2, (1,), generator=g)):
        return tiles(rows, columns, g, offset, projection)
    return element_piece(rows, columns, 0.05, g, offset, projection)


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 13, 64])
def test_every_composition_of_a_step(rows: int, workload: str) -> None:
    check_exact(tiles, (431, 123), [*WORKLOADS[workload](rows), (1,)], "cpu", seed=rows)


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, int], backend: Backend) -> None:
    check_exact(either, shape, [(0,), (), (1, 0), (0,), *[(3,)] * 5, (2,)], backend, seed=4)


@pytest.mark.parametrize("side", [1, 5, 8, 16, 24, 32, 48, 64, 100])
def test_every_tile_side(side: int) -> None:
    def make(rows: int, columns: int, g: torch.Generator, offset: int, projection: int) -> Piece:
        return block_piece(rows, columns, 0.3, side, g, offset, projection)

    # Rows of tiles straddle the row blocks of 1040 rows; the piece below starts off the grid.
    check_exact(make, (1040, 70), [(0,), (1,), (1, 0), *[(3,)] * 5, ()], "cpu", seed=side)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    check_independent(tiles, (431, 123))
    check_independent(either, (1040, 64))


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_a_weight_of_zero_masks(backend: Backend) -> None:
    check_masked(tiles, (123, 431), backend)
