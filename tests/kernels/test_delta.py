from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gossamer.kernels import BoundDeltas, PackError, Piece, ShapeError, bind, pack, to_dense
from gossamer.kernels.delta import OBJECT_BYTES
from tests.kernels.cases import SHAPES, block_piece, dense, element_piece, generator


def pieces_for(shape: tuple[int, int], seed: int) -> list[Piece]:
    g = generator(seed)
    rows, columns = shape
    cut = rows // 2
    pieces = [element_piece(rows - cut, columns, 0.05, g, cut, 1)]
    if cut:
        pieces += [
            block_piece(cut, columns, 0.3, (8, 16, 32, 7)[seed % 4], g),
            element_piece(cut, columns, 0.0, g),
            element_piece(cut, columns, 0.7, g),
        ]
    return pieces


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_packers_write_the_same_bytes_and_lose_nothing(
    shape: tuple[int, int], seed: int
) -> None:
    pieces = pieces_for(shape, seed)
    compiled, plain = pack(pieces, shape, 2), pack(pieces, shape, 2, "reference")
    assert torch.equal(compiled.data, plain.data)
    assert (
        torch.equal(to_dense(compiled).double(), dense(pieces, shape).float().double())
        or (to_dense(compiled).double() - dense(pieces, shape)).abs().max() < 1e-6
    )
    entries = sum(len(p.positions) if p.kind == "element" else clipped(p, shape[1]) for p in pieces)
    assert compiled.nnz == plain.nnz == entries


def clipped(piece: Piece, columns: int) -> int:
    ones = replace(piece, values=torch.ones_like(piece.values), row_offset=0)
    return int(dense([ones], (piece.rows, columns)).sum())


def test_bytes_are_few_and_all_reported() -> None:
    g = generator(0)
    for density, limit in ((0.1, 6.3), (0.01, 7.1), (0.005, 7.7)):
        mask = torch.rand(3072, 576, generator=g) < density
        positions = mask.flatten().nonzero().flatten()
        piece = Piece("element", 0, 0, 3072, 1, positions, torch.ones(len(positions)))
        packed = pack([piece], (3072, 576))
        assert packed.nbytes == packed.data.nbytes + OBJECT_BYTES
        assert packed.nbytes / packed.nnz < limit
    tiles = block_piece(3072, 576, 0.05, 16, g)
    packed = pack([tiles], (3072, 576))
    assert packed.nbytes / packed.nnz < 4.2


GOOD = Piece("element", 0, 0, 4, 1, torch.tensor([0, 5, 7]), torch.ones(3))
TILE = Piece("block", 0, 0, 6, 4, torch.tensor([0, 3]), torch.ones(2, 4, 4))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("positions", "at"),
    [
        ([0, 5, 40], 2),
        ([-1, 5, 7], 0),
        ([0, 7, 5], 2),
        ([0, 5, 5], 2),
        ([0, 5, 2**62], 2),
        ([0, -(2**63), 7], 1),
        ([2**63 - 1, 5, 7], 0),
    ],
)
def test_a_bad_position_is_named(positions: list[int], at: int, backend: str) -> None:
    bad = replace(GOOD, positions=torch.tensor(positions))
    with pytest.raises(PackError) as caught:
        pack([GOOD, bad], (4, 10), backend=backend)  # type: ignore[arg-type]
    assert (caught.value.piece, caught.value.position) == (1, at)
    assert "piece 1, position" in str(caught.value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("side", [4, 8])
def test_a_bad_tile_is_named(side: int, backend: str) -> None:
    values = torch.zeros(2, side, side)
    tile = replace(TILE, block_size=side, rows=side + 2, values=values)
    shape = (side + 2, side + 2)
    assert pack([tile], shape, backend=backend).nnz == side * side + 4  # type: ignore[arg-type]
    stray = values.clone()
    stray[1, 0, 2] = torch.nan
    for bad in (
        replace(tile, positions=torch.tensor([0, 4])),
        replace(tile, positions=torch.tensor([3, 3])),
        replace(tile, values=stray),
    ):
        with pytest.raises(PackError) as caught:
            pack([bad], shape, backend=backend)  # type: ignore[arg-type]
        assert (caught.value.piece, caught.value.position) == (0, 1)


@pytest.mark.parametrize(
    "bad",
    [
        replace(GOOD, rows=5),
        replace(GOOD, row_offset=-1),
        replace(GOOD, rows=-1),
        replace(GOOD, projection=1),
        replace(GOOD, projection=-1),
        replace(GOOD, values=torch.ones(2)),
        replace(GOOD, values=torch.ones(3).double()),
        replace(GOOD, positions=torch.tensor([0, 5, 7], dtype=torch.int32)),
        replace(TILE, rows=4, block_size=0),
        replace(TILE, rows=4, block_size=8),
    ],
    ids=range(10),
)
def test_a_piece_that_does_not_fit_is_refused(bad: Piece) -> None:
    with pytest.raises(PackError) as caught:
        pack([bad], (4, 10))
    assert caught.value.position is None


def test_too_many_columns_are_refused() -> None:
    with pytest.raises(PackError, match="65536"):
        pack([replace(GOOD, rows=1)], (4, 65537))


def test_bind_wants_one_shape_and_counts() -> None:
    packed = pack([GOOD], (4, 10))
    both = bind([packed, None, packed], (4, 10))
    assert (both.nnz, both.table.tolist()[6]) == (6, 0)
    assert both.table.tolist()[5] == packed.data.data_ptr()
    assert both.table.tolist()[:5] == [4, 10, 16, 1, 6]
    assert bind([None], (4, 10)).is_empty
    with pytest.raises(ShapeError):
        bind([packed], (10, 4))
    with pytest.raises(ShapeError):
        bind([packed, pack([GOOD], (4, 10), 2)], (4, 10))


def test_a_room_says_what_the_deltas_say_that_it_holds() -> None:
    packed = pack([GOOD], (4, 10))
    room = BoundDeltas.room((4, 10), projections=1, slots=3)
    address = room.table.data_ptr()
    empty = room.table.tolist()
    for deltas in ([packed, None, packed], [None, packed], [packed]):
        bound = bind(deltas, (4, 10))
        room.hold(bound)
        assert room.table.tolist() == bound.table.tolist() + [0] * (3 - len(deltas))
    room.hold(None)
    assert room.table.tolist() == empty
    assert room.table.data_ptr() == address
    assert not room.is_empty
    for bound in (bind([packed] * 4, (4, 10)), bind([None], (10, 4))):
        with pytest.raises(ShapeError):
            room.hold(bound)


def test_the_package_and_the_reference_need_no_numba() -> None:
    script = """
import sys
sys.modules["numba"] = None
import torch
import gossamer.kernels as k
assert "llvmlite" not in sys.modules
piece = k.Piece("element", 0, 0, 4, 1, torch.tensor([0, 5]), torch.ones(2))
packed = k.pack([piece], (4, 10), backend="reference")
y = torch.zeros(1, 4)
k.apply(y, torch.ones(1, 10), k.bind([packed], (4, 10)), k.WorkPlan.build([(0,)]),
        torch.ones(1, 1, 1), "reference")
assert y.tolist() == [[2.0, 0.0, 0.0, 0.0]]
k.warm_up("reference")
try:
    k.pack([piece], (4, 10))
except k.BackendUnavailableError as error:
    print(error.backend, set(k.available_backends()) & {"cpu", "reference"})
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "cpu {'reference'}", run.stderr
