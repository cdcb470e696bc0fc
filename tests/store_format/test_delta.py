"""Deltas as values: conversions, the dense meaning, and the rules they keep."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gossamer.store.delta import (
    Delta,
    DeltaSet,
    ValueDtype,
    find_problem,
    run_is_sound,
)
from gossamer.store.errors import DeltaError
from gossamer.store.values import bf16_from_f32, f32_from_bf16, to_carrier
from tests.store_format.strategies import DTYPES, deltas, steady


@steady
@given(st.lists(st.floats(width=32), max_size=50))
def test_bfloat16_rounds_as_torch_does(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    reference = torch.from_numpy(values).bfloat16()
    ours = bf16_from_f32(values)
    numbers_only = ~np.isnan(values)
    expected = reference.view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(ours[numbers_only], expected[numbers_only])
    assert np.isnan(f32_from_bf16(ours[~numbers_only])).all()


def test_bfloat16_ties_go_to_even() -> None:
    ties = np.array([0x3F80_8000, 0x3F81_8000, 0x3F80_8001], np.uint32).view(np.float32)
    assert bf16_from_f32(ties).tolist() == [0x3F80, 0x3F82, 0x3F81]


@steady
@given(deltas())
def test_dense_and_elements_agree(delta: Delta) -> None:
    positions, values = delta.elements()
    dense = np.zeros(delta.shape, np.float32)
    dense.reshape(-1)[positions] = values
    assert np.array_equal(dense, delta.dense())
    assert positions.size == values.size == delta.nnz
    assert (np.diff(positions) > 0).all()
    assert find_problem(delta) is None


@steady
@given(deltas(kinds=("block",)))
def test_a_block_is_its_tiles_one_by_one(delta: Delta) -> None:
    dense = np.zeros(delta.shape, np.float32)
    size, columns = delta.block_size, delta.grid[1]
    nnz = 0
    for position, tile in zip(delta.positions, delta.values_f32(), strict=True):
        row, column = position // columns * size, position % columns * size
        window = dense[row : row + size, column : column + size]
        window[:] = tile[: window.shape[0], : window.shape[1]]
        nnz += window.size
    assert np.array_equal(dense, delta.dense())
    assert nnz == delta.nnz


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("block", [None, 4, 16])
def test_from_dense_finds_every_entry(dtype: ValueDtype, block: int | None) -> None:
    generator = np.random.default_rng(0)
    dense = np.zeros((31, 45), np.float32)
    chosen = generator.random(dense.shape) < 0.03
    dense[chosen] = np.round(generator.normal(size=int(chosen.sum())) * 8) / 8 + 0.0625
    delta = Delta.from_dense(dense, block_size=block, value_dtype=dtype)
    assert np.array_equal(delta.dense(), dense)
    assert (delta.nnz == chosen.sum()) == (block is None)
    dense[0, 0] += 1
    assert not np.array_equal(delta.dense(), dense)


def test_from_coo_sorts_and_refuses_a_coordinate_given_twice() -> None:
    delta = Delta.from_coo((3, 4), [2, 0, 1], [1, 3, 0], [1.0, 2.0, 3.0])
    assert delta.positions.tolist() == [3, 4, 9]
    assert delta.values.tolist() == [2.0, 3.0, 1.0]
    with pytest.raises(DeltaError, match="strictly increasing"):
        Delta.from_coo((3, 4), [0, 0], [1, 1], [1.0, 1.0])
    with pytest.raises(DeltaError, match="column -1"):
        Delta.from_coo((3, 4), [0], [-1], [1.0])
    with pytest.raises(DeltaError, match="row 3"):
        Delta.from_coo((3, 4), [3], [0], [1.0])


def test_a_block_is_clipped_at_the_edge() -> None:
    tile = np.ones((1, 4, 4), np.float32)
    delta = Delta.block((6, 5), 4, [3], tile)  # the corner tile: 2 × 1 of it lie inside
    assert delta.nnz == 2
    assert delta.values.sum() == 2
    assert tile.sum() == 16
    assert delta.dense().sum() == 2


def test_the_scale_is_a_float32() -> None:
    delta = Delta.element((1, 2), [1], [3.0], scale=0.1)
    assert delta.scale == float(np.float32(0.1))
    assert delta.values_f32().tolist() == [float(np.float32(3) * np.float32(0.1))]


def test_values_f32_never_hands_out_the_stored_array() -> None:
    delta = Delta.element((1, 2), [1], np.array([3.0], np.float32))
    delta.values_f32()[0] = 7
    assert delta.values.tolist() == [3.0]


@pytest.mark.parametrize(
    ("make", "message", "position"),
    [
        (lambda: Delta.element((2, 2), [4], [1.0]), r"not in \[0, 4\)", 0),
        (lambda: Delta.element((2, 2), [0, -1], [1.0, 1.0]), r"not in \[0, 4\)", 1),
        (lambda: Delta.element((2, 2), [1, 0], [1.0, 1.0]), "strictly increasing", 1),
        (lambda: Delta.element((2, 2), [1, 1], [1.0, 1.0]), "strictly increasing", 1),
        (lambda: Delta.element((2, 2), [0, 1], [1.0, np.nan]), "not finite", 1),
        (lambda: Delta.element((2, 2), [0], [1e6], value_dtype="F16"), "not finite", 0),
        (lambda: Delta.element((2, 2), [0, 3], [1.0, 1e38]), "larger than 65504", 1),
        (lambda: Delta.element((2, 2), [0], [1.0], scale=1e6), "larger than", 0),
        (lambda: Delta.element((2, 2), [0], [1.0], scale=1e-60), "scale", None),
        (lambda: Delta.element((2, 2), [0], [1.0], scale=1e300), "scale", None),
        (lambda: Delta.element((2, 2), [0.5], [1.0]), "integers", None),
        (lambda: Delta.element((2, 2), [0], [1]), "floats", None),
        (lambda: Delta.element((2, 2), [0, 1], [1.0]), "shape", None),
        (lambda: Delta.element((0, 2), [], []), "empty", None),
        (lambda: Delta.block((4, 4), 3, [0], np.ones((1, 3, 3))), "block size", None),
        (lambda: Delta.block((4, 4), 4, [1], np.ones((1, 4, 4))), "not in", 0),
        (lambda: Delta.from_dense(np.ones((4, 4)), block_size=5), "block size", None),
        (lambda: Delta.from_dense(np.ones(4)), "two dimensions", None),
    ],
)
def test_a_broken_delta_is_refused(make, message: str, position: int | None) -> None:
    with pytest.raises(DeltaError, match=message) as refused:
        make()
    assert refused.value.position == position


@pytest.mark.parametrize(
    ("positions", "values", "message"),
    [
        (np.array([0], np.int32), np.ones(1, np.float32), "int64"),
        (np.array([[0]]), np.ones(1, np.float32), "one dimension"),
        (np.array([0]), np.ones(1), "cannot carry F32"),
    ],
)
def test_arrays_of_the_wrong_kind_are_found(positions, values, message: str) -> None:
    problem = find_problem(Delta("element", (2, 2), 1, positions, values, "F32"))
    assert problem
    assert message in problem.message


def test_a_set_counts_all_weights() -> None:
    delta = Delta.block((6, 5), 4, [0, 3], np.ones((2, 4, 4), np.float32))
    assert DeltaSet("", "b", {"a": delta, "b": Delta.element((2, 2), [], [])}).nnz == 18


Array = NDArray[Any]


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Delta], Array, Array]:
    """Deltas of one kind, block size and dtype, empty ones among them, and their joined arrays."""
    size, dtype = draw(st.sampled_from([1, 4])), draw(st.sampled_from(DTYPES))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    made = []
    for _ in range(draw(st.integers(1, 6))):
        shape = draw(
            st.sampled_from([(4, 8), (12, 4), (20, 16), (1, 7)] if size == 1 else [(4, 8)])
        )
        kind = Delta.element if size == 1 else functools.partial(Delta.block, block_size=size)
        capacity = -(-shape[0] // size) * -(-shape[1] // size)
        where = np.flatnonzero(generator.random(capacity) < draw(st.sampled_from([0.0, 0.4, 1.0])))
        tile = () if size == 1 else (size, size)
        values = generator.normal(size=(where.size, *tile)).astype(np.float32)
        scale = draw(st.sampled_from([1.0, -0.5]))
        made.append(kind(shape, positions=where, values=values, value_dtype=dtype, scale=scale))
    positions = np.concatenate([delta.positions for delta in made])
    values = np.concatenate([delta.values for delta in made])
    return joined(made, positions, values), positions, values


def joined(deltas: list[Delta], positions: Array, values: Array) -> list[Delta]:
    """The same deltas as parts of two arrays."""
    ends = np.cumsum([delta.positions.size for delta in deltas])
    parts = [slice(end - d.positions.size, end) for d, end in zip(deltas, ends, strict=True)]
    return [
        replace(delta, positions=positions[part], values=values[part])
        for delta, part in zip(deltas, parts, strict=True)
    ]


@steady
@given(runs(), st.data())
def test_a_run_is_sound_if_no_delta_of_it_has_a_problem(
    run: tuple[list[Delta], Array, Array], data: st.DataObject
) -> None:
    deltas, positions, values = run
    assert all(find_problem(delta) is None for delta in deltas)
    assert run_is_sound(deltas, positions, values) == bool(positions.size)
    if not positions.size:
        return
    at = data.draw(st.integers(0, positions.size - 1))
    if data.draw(st.booleans()):
        positions[at] = data.draw(st.sampled_from([-1, 0, 1, 7, 27, 31, 32, 47, 319, 320, 2**40]))
    else:
        bad = data.draw(st.sampled_from([0.5, np.nan, np.inf, -np.inf, 60000.0, 3.0]))
        carried = to_carrier(np.array([bad], np.float32), deltas[0].value_dtype)
        values.reshape(positions.size, -1)[at, -1] = carried[0]
    limit = data.draw(st.sampled_from([2.0, 65504.0]))
    if run_is_sound(deltas, positions, values, limit):
        assert all(find_problem(delta, limit) is None for delta in deltas)
    else:
        assert any(find_problem(delta, limit) is not None for delta in deltas)


def test_a_ragged_run_is_left_to_the_check_of_each() -> None:
    tile = np.ones((1, 4, 4), np.float32)
    delta = Delta.block((6, 5), 4, [3], tile)
    assert not run_is_sound([delta], delta.positions, delta.values)
    assert find_problem(delta) is None
