"""Fusing, undoing and spreading out deltas by the Triton kernels, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.kernels import Coding, PackedDelta, ShapeError, fuse_into, pack, restore, to_dense
from gossamer.kernels.gpu.scatter import dense
from tests.kernels.cases import CODINGS, block_piece, element_piece, generator, same_bits

SHAPE = (70, 123)
CUT = 32
CASES: list[tuple[torch.dtype, Coding]] = [
    *CODINGS.items(),
    (torch.bfloat16, "int8"),
    (torch.float32, "int8"),
]


def delta(side: int, coding: Coding, seed: int, device: str) -> PackedDelta:
    """Two projections, one dense enough for groups, one sparse; entries (side 0) or tiles."""
    g = generator(seed)
    above, below = SHAPE[0] - CUT, CUT
    if side:
        pieces = [
            block_piece(CUT, SHAPE[1], 0.3, side, g, 0, 0),
            block_piece(above, SHAPE[1], 0.4, side, g, CUT, 1),
        ]
    else:
        pieces = [
            element_piece(below, SHAPE[1], 0.4, g, 0, 0),
            element_piece(above, SHAPE[1], 0.02, g, CUT, 1),
        ]
    packed = pack(pieces, SHAPE, 2, "triton", coding)
    return packed.moved(packed.data.to(device))


@pytest.mark.parametrize(("dtype", "coding"), CASES, ids=str)
@pytest.mark.parametrize("side", [0, 8, 16, 32])
def test_interpret_fusing_and_undoing(
    side: int, dtype: torch.dtype, coding: Coding, device: str
) -> None:
    kinds = (side, 0, 16)
    deltas = [delta(kind, coding, seed, device) for seed, kind in enumerate(kinds)]
    for members in (deltas[:1], deltas):
        # Some entries are -0, which undoing must bring back, and another stride.
        base = torch.randn(SHAPE[::-1], generator=generator(9)).to(dtype).t()
        base[::3] *= -0.0
        factors = torch.randn(len(members), 2, generator=generator(8))
        factors[0, 0] = 0
        got, want = base.clone().to(device), base.clone()
        saved = fuse_into(got, members, factors, backend="triton")
        fuse_into(want, [m.moved(m.data.cpu()) for m in members], factors, backend="reference")
        assert torch.equal(got.cpu(), want)
        assert not torch.equal(want, base)
        wrong = want.clone()
        fuse_into(wrong, members[:1], factors[:1], backend="reference")
        assert not torch.equal(got.cpu(), wrong)
        restore(got, saved)
        assert same_bits(got.cpu(), base)


@pytest.mark.parametrize(("dtype", "coding"), CASES, ids=str)
@pytest.mark.parametrize("side", [0, 16])
def test_interpret_spreading_out(
    side: int, dtype: torch.dtype, coding: Coding, device: str
) -> None:
    packed = delta(side, coding, 3, device)
    spread = dense(packed, dtype)
    exact = to_dense(packed)
    if coding == "int8":
        assert torch.equal(spread.float().cpu(), exact.to(dtype).float())
    else:  # nothing is lost: the dtype holds the coding
        assert torch.equal(spread.float().cpu(), exact)
    assert int((spread != 0).sum()) > 100


def test_interpret_many_fuses_and_undoes_leave_no_trace(device: str) -> None:
    base: Tensor = torch.randn(SHAPE, generator=generator(1)).bfloat16().to(device)
    weight = base.clone()
    deltas = [delta(kind, "bfloat16", kind, device) for kind in (0, 16)]
    for cycle in range(5 if device == "cpu" else 10_000):
        saved = fuse_into(weight, deltas, torch.full((2, 1), 0.1 * cycle + 0.1), backend="triton")
        restore(weight, saved)
    assert same_bits(weight.cpu(), base.cpu())


def test_what_does_not_fit_a_scatter() -> None:
    packed = delta(0, "bfloat16", 0, "cpu")
    other = delta(0, "float32", 0, "cpu")
    weight = torch.zeros(SHAPE, dtype=torch.bfloat16)
    with pytest.raises(ShapeError):
        fuse_into(weight, [packed, other], torch.ones(2, 1), backend="triton")
    with pytest.raises(ShapeError):
        fuse_into(weight[:-1], [packed], torch.ones(1, 1), backend="triton")
    with pytest.raises(ShapeError):
        fuse_into(weight.double(), [packed], torch.ones(1, 1), backend="triton")
    assert not weight.any()
