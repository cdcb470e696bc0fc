"""Hypothesis strategies: deltas of every kind, dtype and awkward shape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from gossamer.store.delta import Delta, DeltaSet, ValueDtype

#: For tests whose examples share a busy machine: no deadline for the single example.
steady = settings(deadline=None)

SHAPES = [(1, 1), (1, 7), (6, 42), (42, 6), (123, 5), (16, 16), (31, 33), (64, 48)]
DTYPES: list[ValueDtype] = ["F32", "F16", "BF16"]
BLOCKS = [2, 4, 8, 16]


@st.composite
def deltas(
    draw: st.DrawFn,
    shape: tuple[int, int] | None = None,
    kinds: tuple[str, ...] = ("element", "block"),
    magnitude: float = 4.0,
) -> Delta:
    """A delta of `shape`, or of one of SHAPES; empty, full, and anything between."""
    shape = draw(st.sampled_from(SHAPES)) if shape is None else shape
    dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([1.0, 1.0, 0.5, -3.0, 0.1]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    fill = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    size = draw(st.sampled_from(BLOCKS)) if draw(st.sampled_from(kinds)) == "block" else 1
    capacity = math.prod(-(-side // size) for side in shape)
    where = np.flatnonzero(generator.random(capacity) < fill)
    tile = () if size == 1 else (size, size)
    values = generator.normal(size=(where.size, *tile)).astype(np.float32)
    values = np.clip(values, -magnitude, magnitude)
    values[generator.random(values.shape) < 0.1] = 0.0  # stored zeros belong to the support
    if size == 1:
        return Delta.element(shape, where, values, value_dtype=dtype, scale=scale)
    return Delta.block(shape, size, where, values, value_dtype=dtype, scale=scale)


NAMES = ["a", "b.weight", "ä", "model.layers.0.q_proj.weight", "model.layers.10.q_proj.weight"]
NAMES += ["model.layers.2.q_proj.weight", "z" * 200]


@st.composite
def delta_sets(draw: st.DrawFn) -> DeltaSet:
    """Up to seven weights, with a record and a fingerprint or without."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    fingerprint = draw(st.sampled_from(["", "sha256:" + "0f" * 32]))
    record: dict[str, Any] = draw(st.sampled_from([{}, {"method": "sparta", "loss": [1.5, 0.25]}]))
    return DeltaSet(fingerprint, "tiny ✓", {name: draw(deltas()) for name in names}, record)


def same(left: DeltaSet, right: DeltaSet) -> bool:
    """Whether two sets agree in everything, bit for bit."""
    if sorted(left.deltas) != sorted(right.deltas) or left.record != right.record:
        return False
    head = (left.base_fingerprint, left.base_name) == (right.base_fingerprint, right.base_name)
    return head and all(_same_delta(left.deltas[name], right.deltas[name]) for name in left.deltas)


def _same_delta(left: Delta, right: Delta) -> bool:
    return (
        (left.kind, left.shape, left.block_size, left.value_dtype, left.scale)
        == (right.kind, right.shape, right.block_size, right.value_dtype, right.scale)
        and left.positions.dtype == right.positions.dtype == np.int64
        and np.array_equal(left.positions, right.positions)
        and left.values.dtype == right.values.dtype
        and left.values.tobytes() == right.values.tobytes()
    )
