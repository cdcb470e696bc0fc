from __future__ import annotations

import pytest
import torch

from gossamer.kernels import ShapeError, WorkPlan, apply
from tests.kernels.cases import bound, element_piece, generator


def unfold(plan: WorkPlan) -> dict[int, tuple[int, ...]]:
    """Slots by row, read back from the plan's tensors."""
    rows: dict[int, tuple[int, ...]] = {}
    for first, count, start, members in plan.chunks.tolist():
        for row in plan.order[first : first + count].tolist():
            assert row not in rows
            rows[row] = tuple(plan.sets[start : start + members].tolist())
    return rows


def test_rows_with_equal_sets_share_chunks() -> None:
    row_slots = [(0,), (), (1, 0), (0,), (0, 1), (1, 0), (5,)]
    plan = WorkPlan.build(row_slots)
    assert unfold(plan) == {t: s for t, s in enumerate(row_slots) if s}
    assert (plan.rows, plan.members, plan.slots, plan.is_empty) == (7, 2, 6, False)
    assert plan.chunks[:, 1].tolist() == [2, 1, 2, 1]


def test_runs_say_the_same_as_rows() -> None:
    runs = [(3, (2,)), (0, (9,)), (40, (0, 1)), (2, ()), (17, (2,))]
    rows = [slots for count, slots in runs for _ in range(count)]
    one, other = WorkPlan.build(runs=runs), WorkPlan.build(rows)
    assert unfold(one) == unfold(other)
    assert one.chunks.tolist() == other.chunks.tolist()
    assert one.chunks[:, 1].tolist() == [16, 16, 8, 16, 4]
    assert one.rows == 62
    assert one.nbytes == 8 * (4 + 62 + 60 + 5 * 4 + 3)


def test_chunks_are_no_longer_than_asked() -> None:
    assert WorkPlan.build([(0,)] * 7, chunk_rows=3).chunks[:, 1].tolist() == [3, 3, 1]


@pytest.mark.parametrize("rows", [[], [()], [(), ()]])
def test_a_step_of_base_rows_is_empty(rows: list[tuple[int, ...]]) -> None:
    plan = WorkPlan.build(rows)
    assert plan.is_empty
    assert (plan.rows, plan.members, plan.slots) == (len(rows), 0, 0)


def test_contradictions_are_refused() -> None:
    for arguments in (
        {"row_slots": [(0, 0)]},
        {"row_slots": [(-1,)]},
        {"runs": [(-1, (0,))]},
        {"row_slots": [(0,)], "runs": [(1, (0,))]},
        {"row_slots": [(0,)], "chunk_rows": 17},
        {"row_slots": [(0,)], "chunk_rows": 0},
    ):
        with pytest.raises(ValueError):
            WorkPlan.build(**arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_apply_refuses_what_does_not_fit(backend: str) -> None:
    deltas = bound([[element_piece(6, 42, 0.3, generator(0))]] * 2, (6, 42), 2)
    plan = WorkPlan.build([(0,), (1,), (0, 1)])
    x, y, weights = torch.randn(3, 42), torch.randn(3, 6), torch.ones(3, 2, 2)
    before = y.clone()
    far = WorkPlan.build([(0,), (1,), (2, 1)])
    for bad in (
        (y[:2], x, deltas, plan, weights),
        (y, x[:, :41], deltas, plan, weights),
        (y, x, deltas, far, weights),
        (y, x, deltas, plan, weights[:, :1]),
        (y, x, deltas, plan, torch.ones(3, 2, 3)),
        (y, x, deltas, plan, weights.double()),
    ):
        with pytest.raises(ShapeError):
            apply(*bad, backend)  # type: ignore[arg-type]
    assert torch.equal(y, before)


def test_the_cpu_backend_refuses_other_dtypes_and_layouts() -> None:
    deltas = bound([[element_piece(6, 42, 0.3, generator(0))]], (6, 42))
    plan, weights = WorkPlan.build([(0,)] * 3), torch.ones(3, 1, 1)
    x, y = torch.randn(3, 42), torch.randn(3, 6)
    for bad_y, bad_x in (
        (y.double(), x),
        (y, x.bfloat16()),
        (y.t().contiguous().t(), x),
        (y, x.t().contiguous().t()),
    ):
        with pytest.raises(ShapeError):
            apply(bad_y, bad_x, deltas, plan, weights)


def test_a_room_says_what_the_plan_says_that_it_holds() -> None:
    room = WorkPlan.room(rows=5, members=2)
    address = room.data.data_ptr()
    every = [(4, 1), (3,), (2, 0), (9,), (6, 7)]  # as much as there can be: a chunk a row
    for rows in (every, [(0,)] * 5, [(), (1,), (), (), ()], every):
        plan = WorkPlan.build(rows)
        room.hold(plan)
        assert room.data[: len(plan.data)].tolist() == plan.data.tolist()
        assert room.data.data_ptr() == address
    for other in ([(0,)] * 4, [(0, 1, 2)] * 5):
        with pytest.raises(ShapeError):
            room.hold(WorkPlan.build(other))
