"""The alignment of sorted positions, against sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.merge.align import align, warm_up
from tests.store_format.strategies import steady


@steady
@given(
    st.lists(st.sets(st.integers(0, 299), max_size=300), min_size=1, max_size=9),
    st.sampled_from([1, 2]),
)
def test_it_finds_what_sets_find(sets: list[set[int]], least: int) -> None:
    parts = [np.array(sorted(one), np.int64) for one in sets]
    found = align(parts, least, 300)
    counts = {p: sum(p in one for one in sets) for p in set().union(*sets)}
    expected = sorted(p for p, count in counts.items() if count >= least)
    assert found.positions.tolist() == expected
    begin = 0
    for member, (part, end) in enumerate(zip(parts, found.ends, strict=True)):
        entries = found.entries[begin:end]
        assert part[entries].tolist() == [p for p in sorted(sets[member]) if p in set(expected)]
        ranks = found.cells[begin:end] - member * len(expected)
        assert found.positions[ranks].tolist() == part[entries].tolist()
        begin = end
    assert begin == found.entries.size == found.cells.size


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 2**20])
def test_the_last_position_of_a_weight(capacity: int) -> None:
    last = np.array([capacity - 1])
    found = align([last, last], 2, capacity)
    assert found.positions.tolist() == [capacity - 1]
    assert found.cells.tolist() == [0, 1]


def test_many_members() -> None:
    found = align([np.array([3, 5 + index]) for index in range(40)], 2, 100)
    assert found.positions.tolist() == [3]
    assert found.ends == list(range(1, 41))


def test_warming_up_leaves_a_working_alignment() -> None:
    warm_up()
    assert align([np.array([1]), np.array([2])], 2, 3).positions.size == 0
