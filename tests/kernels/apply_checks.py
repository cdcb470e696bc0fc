"""What `apply` must hold for every kind of delta; test_element and test_block run all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gossamer.kernels import EXACT_CODINGS, Backend, Coding, Piece, apply
from gossamer.kernels.tolerances import agrees
from tests.kernels.cases import (
    bound,
    dense,
    expected,
    generator,
    off_by_one,
    plan_of,
    poisoned,
    same_bits,
)

MakePiece = Callable[[int, int, torch.Generator, int, int], Piece]
RowSlots = Sequence[tuple[int, ...]]

#: Step compositions by name: how popular each adapter is, as in punica's workloads.
WORKLOADS: dict[str, Callable[[int], RowSlots]] = {
    "distinct": lambda t: [(i % 64,) for i in range(t)],
    "identical": lambda t: [(0,)] * t,
    "pairs": lambda t: [(i // 2 % 64,) for i in range(t)],
    "half base": lambda t: [(i // 2,) if i % 2 else () for i in range(t)],
    "mixes": lambda t: [(i % 3, 3 + i % 2, 5 + i % 5)[: i % 4] for i in range(t)],
    "shared mix": lambda t: [(4, 1, 3, 0)] * t,
}


def slots_needed(row_slots: RowSlots) -> int:
    return 1 + max((s for slots in row_slots for s in slots), default=0)


def check_exact(
    make: MakePiece,
    shape: tuple[int, int],
    row_slots: RowSlots,
    backend: Backend,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    coding: Coding | None = None,
) -> None:
    """Against float64, over poisoned rows; and a delta with one index off by one is noticed."""
    g = generator(seed)
    cut = shape[0] // 3
    projection_of_row = torch.tensor([0] * cut + [1] * (shape[0] - cut))
    residents: list[list[Piece] | None] = []
    for slot in range(slots_needed(row_slots)):
        upper = make(cut, shape[1], g, 0, 0) if cut else make(shape[0], shape[1], g, 0, 1)
        lower = make(shape[0] - cut, shape[1], g, cut, 1)
        residents.append(None if slot == 2 else [upper, lower] if cut else [upper])
    matrices = [None if r is None else dense(r, shape) for r in residents]
    x = poisoned(shape[1], row_slots, g).to(dtype)
    y = poisoned(shape[0], row_slots, g).to(dtype)
    plan = plan_of(row_slots).to(device)
    coding = coding or EXACT_CODINGS[dtype]
    weights = torch.randn(len(row_slots), plan.members + 1, 2, generator=g)
    members = [t for t, slots in enumerate(row_slots) if slots]
    base = [t for t, slots in enumerate(row_slots) if not slots]
    want = expected(y, x, matrices, row_slots, weights, projection_of_row)[members]

    def applied() -> torch.Tensor:
        deltas = bound(residents, shape, 2, backend, coding, device)
        result = y.clone().to(device)
        apply(result, x.to(device), deltas, plan, weights.to(device), backend)
        return result.cpu()

    got = applied()
    assert agrees(got[members], want)
    assert same_bits(got[base], y[base])

    slot = row_slots[members[0]][0]
    pieces = residents[slot]
    assert pieces is not None
    largest = max(pieces, key=lambda p: len(p.positions))
    side = largest.block_size
    cells = -(-largest.rows // side) * -(-shape[1] // side)
    if len(largest.positions) in (0, cells):
        return
    moved = clip(off_by_one(largest, cells), shape[1])
    residents[slot] = [moved if p is largest else p for p in pieces]
    assert not agrees(applied()[members], want)


def clip(piece: Piece, columns: int) -> Piece:
    """Zeroes what a moved tile has outside its piece."""
    if piece.kind == "element":
        return piece
    side = piece.block_size
    across = -(-columns // side)
    inner = torch.arange(side)
    row = (piece.positions // across * side)[:, None, None] + inner[:, None]
    column = (piece.positions % across * side)[:, None, None] + inner
    piece.values[(row >= piece.rows) | (column >= columns)] = 0
    return piece


def check_independent(make: MakePiece, shape: tuple[int, int]) -> None:
    """A row's result has the same bits alone, in any company, chunk size and thread count."""
    g = generator(7)
    residents = [[make(shape[0], shape[1], g, 0, 0)] for _ in range(4)]
    deltas = bound(residents, shape)
    row_slots = [((), (0,), (1, 2), (0, 3, 1))[i % 4] for i in range(41)] + [(2,)] * 23
    x = torch.randn(64, shape[1], generator=g)
    y = torch.randn(64, shape[0], generator=g)
    weights = torch.randn(64, 3, 1, generator=g)
    together = y.clone()
    apply(together, x, deltas, plan_of(row_slots), weights)
    threads = torch.get_num_threads()
    try:
        for chunk_rows, count in ((16, 1), (1, 2), (2, 2), (5, 3), (8, 1), (11, 2)):
            torch.set_num_threads(count)
            again = y.clone()
            apply(again, x, deltas, plan_of(row_slots, chunk_rows), weights)
            assert same_bits(again, together), (chunk_rows, count)
    finally:
        torch.set_num_threads(threads)
    order = torch.randperm(64, generator=g).tolist()
    for rows in (order[:1], order[1:3], order[3:10], order[10:40], order):
        alone = y[rows].clone()
        apply(alone, x[rows], deltas, plan_of([row_slots[r] for r in rows]), weights[rows])
        assert same_bits(alone, together[rows])


def check_independent_on(
    make: MakePiece, device: str, dtype: torch.dtype, *, to_the_bit: bool = True
) -> None:
    """The same for the Triton kernels, whose chunks are of other widths.

    Not `to_the_bit`: equal but for the order of a sum. Triton's interpreter makes `tl.dot` of
    numpy's product, whose rows depend on how many there are, on some processors (AMD's Zen).
    """

    def agree(left: torch.Tensor, right: torch.Tensor) -> bool:
        return same_bits(left, right) if to_the_bit else torch.allclose(left, right, 1e-5, 1e-6)

    g = generator(7)
    shape = (34, 40)
    residents = [[make(shape[0], shape[1], g, 0, 0)] for _ in range(4)]
    deltas = bound(residents, shape, 1, "triton", EXACT_CODINGS[dtype], device)
    row_slots = [((), (0,), (1, 2), (0, 3, 1))[i % 4] for i in range(9)] + [(2,)] * 18
    x = torch.randn(27, shape[1], generator=g).to(device, dtype)
    y = torch.randn(27, shape[0], generator=g).to(device, dtype)
    weights = torch.randn(27, 3, 1, generator=g).to(device)
    together = y.clone()
    apply(together, x, deltas, plan_of(row_slots).to(device), weights, "triton")
    for chunk_rows in (1, 2, 7):
        again = y.clone()
        apply(again, x, deltas, plan_of(row_slots, chunk_rows).to(device), weights, "triton")
        assert agree(again, together), chunk_rows
    order = torch.randperm(27, generator=g).tolist()
    for rows in (order[:1], order[1:3], order[3:12]):
        alone = y[rows].clone()
        plan = plan_of([row_slots[r] for r in rows]).to(device)
        apply(alone, x[rows], deltas, plan, weights[rows], "triton")
        assert agree(alone, together[rows])


def check_masked(
    make: MakePiece, shape: tuple[int, int], backend: Backend, device: str = "cpu"
) -> None:
    """A weight of 0 masks: even an x of NaN leaves the row its bits."""
    g = generator(3)
    residents = [[make(shape[0], shape[1], g, 0, 0)] for _ in range(2)]
    deltas = bound(residents, shape, 1, backend, "float32", device)
    for rows in (1, 2, 7, 16):
        x = torch.randn(rows, shape[1], generator=g).to(device)
        y = torch.randn(rows, shape[0], generator=g).to(device)
        weights = torch.ones(rows, 2, 1, device=device)
        weights[0] = 0
        x[0] = torch.nan
        got = y.clone()
        apply(got, x, deltas, plan_of([(0, 1)] * rows).to(device), weights, backend)
        assert torch.equal(got[0], y[0])
        assert got[1:].isfinite().all()
        assert rows == 1 or not torch.equal(got[1:], y[1:])
