"""Sparse deltas by the Triton kernels, in the interpreter or on a card, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gossamer.kernels import (
    BackendUnavailableError,
    Coding,
    PackError,
    Piece,
    ShapeError,
    apply,
    bind,
    pack,
    to_dense,
)
from gossamer.kernels.gpu import launch, layout
from gossamer.kernels.gpu.dense import multiply
from gossamer.kernels.tolerances import TOLERANCES, agrees, deviation
from tests.kernels.apply_checks import (
    WORKLOADS,
    check_exact,
    check_independent_on,
    check_masked,
)
from tests.kernels.cases import (
    block_piece,
    bound,
    dense,
    element_piece,
    expected,
    generator,
    plan_of,
)

DTYPES = list(TOLERANCES)
#: Round and odd, several tiles of 32 rows, more columns than rows and the other way round.
SHAPES = [(6, 42), (42, 6), (131, 123), (123, 131), (1, 1), (64, 300)]
STEP = [(0,), (), (1, 0), (0,), *[(3,)] * 5, (2,)]


def sparse(rows: int, columns: int, g: torch.Generator, offset: int, projection: int) -> Piece:
    density = (0.0005, 0.01, 0.3)[int(torch.randint(3, (1,), generator=g))]
    return element_piece(rows, columns, density, g, offset, projection)


def tiles(rows: int, columns: int, g: torch.Generator, offset: int, projection: int) -> Piece:
    side = (8, 16, 32, 24)[int(torch.randint(4, (1,), generator=g))]
    return block_piece(rows, columns, 0.3, side, g, offset, projection)


def either(rows: int, columns: int, g: torch.Generator, offset: int, projection: int) -> Piece:
    make = tiles if int(torch.randint(2, (1,), generator=g)) else sparse
    return make(rows, columns, g, offset, projection)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpret_every_shape(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check_exact(either, shape, STEP, "triton", 4, dtype, device)


#: (rows, workload); the interpreter takes a tenth of a second for each chunk of rows.
COMPOSITIONS = [(rows, name) for rows in (1, 3, 16) for name in WORKLOADS]
COMPOSITIONS += [(64, "distinct"), (64, "identical")]


@pytest.mark.parametrize(("rows", "workload"), COMPOSITIONS)
def test_interpret_every_composition(rows: int, workload: str, device: str) -> None:
    check_exact(sparse, (33, 40), [*WORKLOADS[workload](rows), (1,)], "triton", rows, device=device)


@pytest.mark.parametrize("side", [5, 8, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpret_every_tile_side(side: int, dtype: torch.dtype, device: str) -> None:
    def make(rows: int, columns: int, g: torch.Generator, offset: int, projection: int) -> Piece:
        return block_piece(rows, columns, 0.3, side, g, offset, projection)

    # One third of 96 rows is on the grid of every side, one of 40 on none.
    for shape in ((96, 40), (40, 70)):
        check_exact(make, shape, [(0,), (1, 0), *[(3,)] * 9, ()], "triton", side, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpret_many_rows_with_one_mix_are_multiplied_densely(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied: list[int] = []

    def noted(terms: torch.Tensor, *others: Any) -> None:
        multiplied.append(len(terms))
        multiply(terms, *others)

    monkeypatch.setattr("gossamer.kernels.gpu.apply.multiply", noted)

    def thick(rows: int, columns: int, g: torch.Generator, offset: int, projection: int) -> Piece:
        return element_piece(rows, columns, 0.2, g, offset, projection)

    step = [(0,), *[(1, 3)] * 70, (), (0,), (3,)]
    check_exact(thick, (34, 50), step, "triton", 1, dtype, device)
    assert multiplied
    multiplied.clear()
    check_exact(sparse, (34, 50), [*[(1,)] * 66, (0,)], "triton", 2, dtype, device)
    check_exact(thick, (34, 50), [*[(1,)] * 30, (0,)], "triton", 3, dtype, device)
    assert not multiplied


def test_interpret_a_row_does_not_depend_on_its_neighbours(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_independent_on(sparse, device, dtype)
    check_independent_on(either, device, torch.float32, to_the_bit=device != "cpu")


def test_interpret_a_weight_of_zero_masks(device: str) -> None:
    check_masked(sparse, (33, 60), "triton", device)
    check_masked(tiles, (33, 60), "triton", device)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_interpret_a_row_of_every_length(rows: int, device: str) -> None:
    # One row each of 0, 1, 2, … entries, and one of more units than a byte counts.
    mask = torch.ones(40, 300).tril(-1)
    mask[39] = 1
    positions = mask.flatten().nonzero().flatten()
    piece = Piece("element", 0, 3, 40, 1, positions, torch.randn(len(positions)))
    x, y, weights = torch.randn(rows, 300), torch.randn(rows, 45), torch.randn(rows, 1, 1)
    want = expected(
        y,
        x,
        [dense([piece], (45, 300))],
        [(0,)] * rows,
        weights,
        torch.zeros(45, dtype=torch.int64),
    )
    deltas = bound([[piece]], (45, 300), 1, "triton", "float32", device)
    present = deltas.deltas[0]
    assert present is not None
    assert present.record[layout.HIGH]
    y = y.to(device)
    apply(y, x.to(device), deltas, plan_of([(0,)] * rows).to(device), weights.to(device), "triton")
    assert agrees(y.cpu(), want)


def uniform_piece(shape: tuple[int, int], density: float, g: torch.Generator) -> Piece:
    """Every row about equally sparse."""
    positions = (torch.rand(shape, generator=g) < density).flatten().nonzero().flatten()
    values = torch.randn(len(positions), generator=g)
    return Piece("element", 0, 0, shape[0], 1, positions, values)


#: Densities at which each coding takes another form.
FORMS = [("int8", 0.002), ("int8", 0.2), ("bfloat16", 0.002), ("bfloat16", 0.2)]


@pytest.mark.parametrize(("coding", "density"), FORMS)
def test_interpret_the_forms_of_entries(coding: Coding, density: float, device: str) -> None:
    g = generator(1)
    shape = (34, 2000)
    pieces = [[uniform_piece(shape, density, g)] for _ in range(2)]
    deltas = bound(pieces, shape, 1, "triton", coding, device)
    forms = {d.record[layout.FORM] for d in deltas.deltas if d is not None}
    grouped = density > 0.1
    single, group = (
        (layout.SPLIT8, layout.GROUP8) if coding == "int8" else (layout.WORD, layout.GROUP)
    )
    assert forms == {group if grouped else single}
    dtype = torch.float32 if coding == "int8" else torch.bfloat16
    row_slots = [(0,), (1, 0), *[(1,)] * 6]
    x, y = torch.randn(8, 2000).to(dtype), torch.randn(8, 34).to(dtype)
    weights = torch.randn(8, 2, 1)
    got = y.clone().to(device)
    apply(got, x.to(device), deltas, plan_of(row_slots).to(device), weights.to(device), "triton")
    # Against what was stored: rounding the values is `pack`'s affair, and tested below.
    stored = [to_dense(d).double() for d in deltas.deltas if d is not None]
    want = expected(y, x, stored, row_slots, weights, torch.zeros(34, dtype=torch.int64))
    assert agrees(got.cpu(), want)
    moved = [m.roll(1, 1) for m in stored]
    assert not agrees(
        got.cpu(), expected(y, x, moved, row_slots, weights, torch.zeros(34, dtype=torch.int64))
    )


def test_what_rounding_the_values_costs() -> None:
    g = generator(2)
    piece = element_piece(128, 4000, 0.02, g)
    exact = dense([piece], (128, 4000))
    errors = {
        coding: deviation(to_dense(pack([piece], (128, 4000), 1, "triton", coding)), exact)
        for coding in ("float32", "float16", "bfloat16", "int8")
    }
    assert errors["float32"] == 0.0
    assert 0 < errors["float16"] < 2.0**-11
    assert errors["float16"] < errors["bfloat16"] < 2.0**-8
    # Half a step of the largest value of a row, which bfloat16 rounds up by up to 2^-8.
    assert errors["bfloat16"] < errors["int8"] <= 0.5 / 127 * (1 + 2.0**-7)


def test_what_does_not_fit_a_launch() -> None:
    piece = element_piece(6, 42, 0.3, generator(0))
    deltas = bound([[piece]], (6, 42), 1, "triton")
    x, y, weights = torch.randn(2, 42), torch.randn(2, 6), torch.ones(2, 1, 1)
    plan = plan_of([(0,), (0,)])
    for bad in (
        (y, x, deltas, plan_of([(1,), (0,)]), weights),  # a slot that nobody has
        (y[:1], x, deltas, plan, weights),
        (y, x[:, :41], deltas, plan, weights),
        (y.bfloat16(), x, deltas, plan, weights),
        (y.bfloat16(), x.bfloat16(), deltas, plan, weights),  # packed for float32
        (y, x, deltas, plan, weights[:1]),
    ):
        with pytest.raises(ShapeError):
            apply(*bad, "triton")
    for i, wrong in enumerate((42 * 6, -1, 2**40)):
        positions = piece.positions.clone()
        positions[-1 if i != 1 else 0] = wrong
        with pytest.raises(PackError):  # an index out of range never reaches a launch
            pack([replace(piece, positions=positions)], (6, 42), 1, "triton")
    with pytest.raises(PackError):
        pack([replace(piece, projection=4)], (6, 42), 5, "triton")
    above = replace(element_piece(3, 42, 0.3, generator(1)), projection=1)
    below = replace(above, projection=0, row_offset=3)
    with pytest.raises(PackError):  # projections in another order than their rows
        pack([above, below], (6, 42), 2, "triton")
    with pytest.raises(ShapeError):
        bind([pack([piece], (6, 42))], (6, 42), "triton")
    with pytest.raises(ShapeError):
        bind([pack([piece], (6, 42), 1, "triton")], (6, 42), "cpu")
    with pytest.raises(ShapeError):
        pack([piece], (6, 42), 1, "cpu", "int8")


def test_compiled_kernels_are_not_given_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    deltas = bound([[element_piece(6, 42, 0.3, generator(0))]], (6, 42), 1, "triton")
    with pytest.raises(BackendUnavailableError):
        apply(
            torch.zeros(1, 6), torch.zeros(1, 42), deltas, plan_of([(0,)]), torch.ones(1, 1, 1),
            "triton",
        )  # fmt: skip
