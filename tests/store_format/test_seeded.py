"""Positions from a seed: exact, uniform, and the same on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.store.format import seeded_positions
from tests.store_format.strategies import steady


@steady
@given(st.integers(0, 2**63 - 1), st.integers(1, 5000), st.data())
def test_exactly_k_distinct_positions_in_order(seed: int, numel: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, numel))
    positions = seeded_positions(seed, "w", numel, k)
    assert positions.dtype == np.int64
    assert positions.size == k
    assert (np.diff(positions) > 0).all()
    assert k == 0 or (positions[0] >= 0 and positions[-1] < numel)
    assert set(seeded_positions(seed, "w", numel, k // 2)) <= set(positions)


@pytest.mark.parametrize(
    ("seed", "name", "numel", "k", "expected"),
    [
        (0, "w", 10, 4, "3a0a66e5bb9bfa96"),
        (42, "model.layers.0.self_attn.v_proj.weight", 110592, 553, "98648659f1651f90"),
        (2**63 - 1, "w", 2**33 + 7, 100_000, "fab3904ff2efce04"),
        (7, "ä", 2**20 + 1, 50_000, "bbda19c85bcddad0"),
    ],
)
def test_the_vectors(seed: int, name: str, numel: int, k: int, expected: str) -> None:
    positions = seeded_positions(seed, name, numel, k)
    found = hashlib.sha256(positions.astype("<u8").tobytes()).hexdigest()[:16]
    assert found == expected


def by_the_book(seed: int, name: str, numel: int, k: int) -> list[int]:
    """docs/format.md, "Positions from a seed", one integer at a time."""
    message = b"gossamer/seeded-positions/1\0"
    message += seed.to_bytes(8, "little") + numel.to_bytes(8, "little") + name.encode()
    key = hashlib.sha256(message).digest()
    keys = [int.from_bytes(key[4 * i : 4 * i + 4], "little") for i in range(8)]
    width = max(2, (numel - 1).bit_length())
    low_bits, high_bits = width // 2, width - width // 2

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x85EBCA6B % 2**32
        x ^= x >> 13
        x = x * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    def permute(point: int) -> int:
        low, high = point % 2**low_bits, point >> low_bits
        for turn in range(8):
            if turn % 2 == 0:
                high ^= mix(low ^ keys[turn]) >> (32 - high_bits)
            else:
                low ^= mix(high ^ keys[turn]) >> (32 - low_bits)
        return int(high << low_bits | low)

    drawn = []
    for start in range(k):
        point = permute(start)
        while point >= numel:
            point = permute(point)
        drawn.append(point)
    return sorted(drawn)


@pytest.mark.parametrize("numel", [1, 2, 3, 5, 64, 65, 1000, 110592, 2**31 + 11])
def test_it_is_what_the_specification_says(numel: int) -> None:
    k = min(numel, 300)
    assert seeded_positions(5, "w", numel, k).tolist() == by_the_book(5, "w", numel, k)


def test_the_sample_is_uniform_over_seeds_and_over_the_weight() -> None:
    numel, k, rounds = 101, 20, 3000
    counts = np.zeros(numel)
    for seed in range(rounds):
        counts[seeded_positions(seed, "w", numel, k)] += 1
    # Chi-squared with 100 degrees of freedom: beyond 170 once in 100 000 times.
    expected = rounds * k / numel
    assert (((counts - expected) ** 2) / (expected * (1 - k / numel))).sum() < 170
    positions = seeded_positions(3, "w", 10_000_000, 100_000)
    gaps = np.diff(positions)
    assert abs(gaps.mean() - 100) < 1
    assert abs(gaps.std() - 99.5) < 2  # geometric, as for a random mask


def test_names_seeds_and_sizes_give_unrelated_positions() -> None:
    one = set(seeded_positions(1, "w", 100_000, 10_000))
    for other in (
        seeded_positions(2, "w", 100_000, 10_000),
        seeded_positions(1, "v", 100_000, 10_000),
        seeded_positions(1, "w", 100_001, 10_000),
    ):
        assert 850 < len(one & set(other)) < 1150  # 1 000 by chance, sigma 28


@pytest.mark.parametrize("bad", [(-1, 5, 1), (2**63, 5, 1), (0, 0, 0), (0, 5, 6), (0, 5, -1)])
def test_what_is_out_of_range_is_refused(bad: tuple[int, int, int]) -> None:
    seed, numel, k = bad
    with pytest.raises(ValueError, match="must be in"):
        seeded_positions(seed, "w", numel, k)
