"""Fusing, undoing and spreading out deltas by the Triton kernels, against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.kernels import (
    EXACT_CODINGS,
    Coding,
    PackedDelta,
    ShapeError,
    Target,
    fuse_into,
    pack,
    restore,
    rounding,
    to_dense,
)
from gossamer.kernels.gpu import fusing, scatter
from gossamer.kernels.gpu.scatter import Action, Jobs, dense
from tests.kernels.cases import block_piece, element_piece, generator, same_bits

SHAPE = (70, 123)
CUT = 32
CASES: list[tuple[torch.dtype, Coding]] = [
    *EXACT_CODINGS.items(),
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
        saved = fuse_into([Target(got, members, factors)], "triton")
        on_host = [m.moved(m.data.cpu()) for m in members]
        fuse_into([Target(want, on_host, factors)], "reference")
        assert torch.equal(got.cpu(), want)
        assert not torch.equal(want, base)
        wrong = want.clone()
        fuse_into([Target(wrong, on_host[:1], factors[:1])], "reference")
        assert not torch.equal(got.cpu(), wrong)
        restore(saved)
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
        factors = torch.full((2, 1), 0.1 * cycle + 0.1)
        restore(fuse_into([Target(weight, deltas, factors)], "triton"))
    assert same_bits(weight.cpu(), base.cpu())


def test_what_does_not_fit_a_scatter() -> None:
    packed = delta(0, "bfloat16", 0, "cpu")
    other = delta(0, "float32", 0, "cpu")
    weight = torch.zeros(SHAPE, dtype=torch.bfloat16)
    with pytest.raises(ShapeError):
        fuse_into([Target(weight, [packed, other], torch.ones(2, 1))], "triton")
    with pytest.raises(ShapeError):
        fuse_into([Target(weight[:-1], [packed], torch.ones(1, 1))], "triton")
    with pytest.raises(ShapeError):
        fuse_into([Target(weight.double(), [packed], torch.ones(1, 1))], "triton")
    assert not weight.any()


def weights_and_mixes(device: str) -> tuple[list[Tensor], list[Target]]:
    """Weights with one member, with three that overlap, and stored the other way around."""
    kinds = [(0,), (16, 0, 8), (8,), (0, 32)]
    g = generator(4)
    weights, targets = [], []
    for i, sides in enumerate(kinds):
        transposed = i % 2 == 1
        weight = torch.randn(SHAPE[::-1] if transposed else SHAPE, generator=g).bfloat16()
        deltas = [delta(side, "bfloat16", 7 * i + j, device) for j, side in enumerate(sides)]
        weights.append(weight.to(device))
        factors = torch.randn(len(sides), 2, generator=g)
        targets.append(Target(weights[-1], deltas, factors, transposed))
    return weights, targets


def by_reference(target: Target) -> Tensor:
    """The fused weight."""
    weight = target.weight.cpu().clone()
    on_host = [d.moved(d.data.cpu()) for d in target.deltas]
    fuse_into([Target(weight, on_host, target.weights, target.transposed)], "reference")
    return weight


@pytest.mark.parametrize("scratch", [1, 1 << 29])
def test_interpret_many_weights_at_once(
    scratch: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusing, "_SCRATCH_BYTES", scratch)
    weights, targets = weights_and_mixes(device)
    before = [weight.clone() for weight in weights]
    for some in (targets, targets[::2]):
        want = [by_reference(target) for target in some]
        saved = fuse_into(some, "triton")
        for target, right in zip(some, want, strict=True):
            assert same_bits(target.weight.cpu(), right)
        restore(saved)
        restore(saved)  # as after an exception in the first
        assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(weights, before, strict=True))
        assert saved.nbytes > 2 * sum(d.nnz for t in some for d in t.deltas) - 1


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
def test_interpret_a_launch_that_fails_leaves_every_weight_as_it_was(
    at: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, targets = weights_and_mixes(device)
    before = [weight.clone() for weight in weights]
    run, calls = Jobs.run, 0

    def failing(self: Jobs, action: Action) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise MemoryError("no room")
        run(self, action)

    monkeypatch.setattr(fusing, "_SCRATCH_BYTES", 1)
    monkeypatch.setattr(Jobs, "run", failing)
    with pytest.raises(MemoryError):
        fuse_into(targets, "triton")
    assert calls == at + 1, "undone once"
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(weights, before, strict=True))


def test_interpret_half_of_a_launch_is_undone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries were written, tiles were not: what was never saved is not put back."""
    both = Target(
        torch.randn(SHAPE, generator=generator(2)).bfloat16().to(device),
        [pack([element_piece(CUT, SHAPE[1], 0.3, generator(1)),
               block_piece(SHAPE[0] - CUT, SHAPE[1], 0.3, 16, generator(1), CUT, 0)],
              SHAPE, 1, "triton", "bfloat16")],
        torch.ones(1, 1),
    )  # fmt: skip
    both.deltas[0].data.data = both.deltas[0].data.to(device)
    before = both.weight.clone()
    launched = 0

    class Failing:
        def __getitem__(self, grid: object) -> Any:
            nonlocal launched
            launched += 1
            if launched == 2:
                raise MemoryError("no room")
            return kernel[grid]

    kernel = scatter._scatter
    monkeypatch.setattr(scatter, "_scatter", Failing())
    with pytest.raises(MemoryError):
        fuse_into([both], "triton")
    assert launched == 3
    assert same_bits(both.weight.cpu(), before.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpret_rounding_agrees_with_the_host(dtype: torch.dtype, device: str) -> None:
    deltas = [delta(side, EXACT_CODINGS[dtype], 5 + side, device) for side in (0, 16)]
    factors = torch.randn(2, 2, generator=generator(6))
    weight = torch.randn(SHAPE, generator=generator(7)).to(dtype)
    found = rounding(Target(weight.to(device), deltas, factors), "triton")
    on_host = [d.moved(d.data.cpu()) for d in deltas]
    want = rounding(Target(weight, on_host, factors))
    assert found == pytest.approx(want, rel=1e-4)
    assert rounding(Target(weight, on_host[:1], factors[:1])) != pytest.approx(want, rel=1e-2)
    one = [d.moved(d.data) for d in deltas[:1]]
    huge = torch.full_like(weight, torch.finfo(dtype).max).to(device)
    lost, _ = rounding(Target(huge, one, torch.full((1, 1), 1e36)), "triton")
    assert not math.isfinite(lost)
