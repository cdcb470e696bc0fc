from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.kernels import (
    Backend,
    PackedDelta,
    Piece,
    ShapeError,
    Target,
    add_dense,
    fuse_into,
    pack,
    restore,
    rounding,
)
from gossamer.kernels.tolerances import agrees
from tests.kernels.cases import (
    HOST_BACKENDS,
    SHAPES,
    block_piece,
    dense,
    element_piece,
    generator,
    off_by_one,
    same_bits,
)


def members(shape: tuple[int, int], g: torch.Generator) -> list[list[Piece]]:
    """Three overlapping deltas of both kinds, over two projections."""
    cut = shape[0] // 3
    result = []
    for side in (8, 16, 5):
        pieces = [element_piece(shape[0] - cut, shape[1], 0.05, g, cut, 1)]
        if cut:
            pieces.append(block_piece(cut, shape[1], 0.4, side, g, 0, 0))
        pieces.append(element_piece(shape[0], shape[1], 0.02, g, 0, 1))
        result.append(pieces)
    return result


def weighted_sum(
    deltas: list[list[Piece]], shape: tuple[int, int], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ w Δ in float64, and where any member with a weight has an entry."""
    total = torch.zeros(shape, dtype=torch.float64)
    touched = torch.zeros(shape, dtype=torch.bool)
    for pieces, row in zip(deltas, weights.tolist(), strict=True):
        for piece in pieces:
            weight = row[piece.projection if len(row) > 1 else 0]
            part = dense([piece], shape)
            total += weight * part
            touched |= (part != 0) & (weight != 0)
    return total, touched


def storage(shape: tuple[int, int], transposed: bool, g: torch.Generator) -> Tensor:
    weight = torch.randn(shape[::-1] if transposed else shape, generator=g)
    weight.view(-1)[::7] = -0.0  # what adding 0 would change
    return weight


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (576, 1536)], ids=str)
def test_fuse_adds_and_restore_gives_every_bit_back(
    shape: tuple[int, int], transposed: bool, backend: Backend
) -> None:
    g = generator(5)
    deltas = members(shape, g)
    packed = [pack(pieces, shape, 2) for pieces in deltas]
    weight = storage(shape, transposed, g)
    before = weight.clone()
    weights = torch.randn(3, 2, generator=g)
    saved = fuse_into([Target(weight, packed, weights, transposed)], backend)
    change, touched = weighted_sum(deltas, shape, weights)
    fused = weight.t() if transposed else weight
    original = before.t() if transposed else before
    assert agrees(fused, original.double() + change)
    assert same_bits(fused[~touched], original[~touched])
    restore(saved)
    assert same_bits(weight, before)
    assert saved.nbytes > 0


def test_a_moved_entry_is_noticed() -> None:
    g = generator(6)
    piece = element_piece(123, 431, 0.01, g)
    weight = storage((123, 431), False, g)
    want = weight.double() + dense([piece], (123, 431))
    moved = pack([off_by_one(piece, 123 * 431)], (123, 431))
    fuse_into([Target(weight, [moved], torch.ones(1, 1))])
    assert not agrees(weight, want)


@pytest.mark.parametrize("transposed", [False, True])
def test_both_backends_write_the_same_bits(transposed: bool) -> None:
    g = generator(8)
    shape = (1040, 64)
    packed = [pack(pieces, shape, 2) for pieces in members(shape, g)]
    weights = torch.randn(3, 2, generator=g)
    weights[1, 1] = 0  # a module filter: left out, not added as 0
    one = storage(shape, transposed, g)
    other = one.clone()
    fuse_into([Target(one, packed, weights, transposed)], "cpu")
    fuse_into([Target(other, packed, weights, transposed)], "reference")
    assert same_bits(one, other)


def test_nested_fuses_unwind_in_reverse() -> None:
    g = generator(9)
    packed = [pack(pieces, (431, 123), 2) for pieces in members((431, 123), g)]
    weight = storage((431, 123), True, g)
    states, saved = [weight.clone()], []
    for delta in packed:
        saved.append(fuse_into([Target(weight, [delta], torch.ones(1, 1), transposed=True)]))
        states.append(weight.clone())
    for state, token in zip(states[-2::-1], reversed(saved), strict=True):
        restore(token)
        assert same_bits(weight, state)


def test_five_hundred_rounds_leave_no_trace() -> None:
    g = generator(10)
    packed = [pack(pieces, (42, 6), 2) for pieces in members((42, 6), g)]
    weight = storage((42, 6), True, g)
    before = weight.clone()
    for _ in range(500):
        restore(fuse_into([Target(weight, packed, torch.rand(3, 1), transposed=True)]))
    assert same_bits(weight, before)


def test_bfloat16_is_rounded_once_and_restored() -> None:
    g = generator(11)
    deltas = members((123, 431), g)
    packed = [pack(pieces, (123, 431), 2) for pieces in deltas]
    weight = torch.randn(123, 431, generator=g).bfloat16()
    before = weight.clone()
    weights = torch.randn(3, 2, generator=g)
    saved = fuse_into([Target(weight, packed, weights)], "reference")
    assert agrees(weight, before.double() + weighted_sum(deltas, (123, 431), weights)[0])
    restore(saved)
    assert torch.equal(weight, before)


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    packed: list[PackedDelta] = [pack([element_piece(6, 42, 0.3, generator(0))], (6, 42))]
    weight = torch.randn(6, 42)
    before = weight.clone()
    good = Target(weight, packed, torch.ones(1, 1))
    for bad in (
        Target(weight, packed, torch.ones(1, 1), transposed=True),
        Target(weight, packed, torch.ones(2, 1)),
        Target(weight, packed, torch.ones(1, 3)),
        Target(weight, packed, torch.ones(1, 1, dtype=torch.float64)),
        Target(weight.double(), packed, torch.ones(1, 1)),
    ):
        with pytest.raises(ShapeError):
            fuse_into([good, bad])
    assert same_bits(weight, before)


def test_add_dense_weighs_each_projection() -> None:
    g = generator(12)
    pieces = members((42, 6), g)[0]
    target = torch.randn(42, 6, generator=g)
    want = target.double() + weighted_sum([pieces], (42, 6), torch.tensor([[2.0, -3.0]]))[0]
    add_dense(target, pack(pieces, (42, 6), 2), (2.0, -3.0))
    assert agrees(target, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(6, 42), (123, 431), (1040, 64)], ids=str)
def test_rounding_is_what_fusing_changes_beyond_the_deltas(
    shape: tuple[int, int], transposed: bool, dtype: torch.dtype
) -> None:
    g = generator(13)
    deltas = members(shape, g)
    packed = [pack(pieces, shape, 2) for pieces in deltas]
    weight = storage(shape, transposed, g).to(dtype)
    weights = torch.randn(3, 2, generator=g)
    weights[1, 1] = 0  # left out: its entries are not touched
    change, touched = weighted_sum(deltas, shape, weights)
    before = weight.clone()
    error, norm = rounding(Target(weight, packed, weights, transposed))
    assert torch.equal(weight, before), "measuring writes nothing"
    original = (weight.t() if transposed else weight).double()
    fuse_into([Target(weight, packed, weights, transposed)], "reference")
    fused = (weight.t() if transposed else weight).double()
    wanted = (fused - original - change)[touched].square().sum()
    assert error == pytest.approx(float(wanted), rel=5e-7)
    assert norm == pytest.approx(float(change.square().sum()), rel=1e-5)
    # an entry that is one place off, or a weight that is another, is another number
    last = [*deltas[2][:-1], off_by_one(deltas[2][-1], shape[0] * shape[1])]
    moved = [*packed[:2], pack(last, shape, 2)]
    one_off = rounding(Target(before, moved, weights, transposed))
    assert one_off[0] != pytest.approx(error, rel=5e-7)
    weights[0, 1] += 1
    heavier = rounding(Target(before, packed, weights, transposed))
    assert heavier[1] != pytest.approx(norm, rel=1e-3)


def test_rounding_knows_what_is_lost_and_what_overflows() -> None:
    piece = Piece("element", 0, 0, 2, 1, torch.tensor([0, 3]), torch.tensor([1e-4, 1e-4]))
    packed = [pack([piece], (2, 2))]
    one = torch.ones(1, 1)
    error, norm = rounding(Target(torch.ones(2, 2).bfloat16(), packed, one))
    assert error == pytest.approx(norm), "1e-4 is absorbed by 1 in bf16: all of it is lost"
    assert rounding(Target(torch.zeros(2, 2).bfloat16(), packed, one))[0] < 1e-4 * norm
    assert rounding(Target(torch.ones(2, 2).bfloat16(), [], torch.ones(0, 1))) == (0.0, 0.0)
    large = Piece("element", 0, 0, 2, 1, torch.tensor([0]), torch.tensor([65000.0]))
    error, _ = rounding(Target(torch.full((2, 2), 65000.0).half(), [pack([large], (2, 2))], one))
    assert error == float("inf")
    with pytest.raises(ShapeError):
        rounding(Target(torch.ones(2, 3).bfloat16(), packed, one))
