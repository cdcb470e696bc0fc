"""The cut that keeps the largest of a stream is that of sorting it, in little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gossamer.store.exchange.largest import Largest


@given(
    parts=st.lists(st.lists(st.integers(0, 12), max_size=12), max_size=12),
    count=st.integers(1, 40),
)
def test_the_cut_is_that_of_sorting(parts: list[list[int]], count: int) -> None:
    largest = Largest(count)
    for part in parts:
        largest.add(np.array(part, np.uint32))
    cut = largest.cut()
    stream = [bits for part in parts for bits in part]
    ties, kept = cut.ties, []
    for at, bits in enumerate(stream):
        if bits > cut.bits or (bits == cut.bits and ties > 0):
            ties -= bits == cut.bits
            kept.append(at)
    ordered = sorted(range(len(stream)), key=lambda at: -stream[at])
    assert kept == sorted(ordered[:count])


def test_the_largest_holds_no_more_than_twice_as_many() -> None:
    largest, generator = Largest(1000), np.random.default_rng(0)
    tracemalloc.start()
    for _ in range(500):
        largest.add(generator.integers(0, 2**31, 1000, np.uint32))
    cut = largest.cut()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cut.bits > 2**31 * 0.99
    assert peak < 100_000
