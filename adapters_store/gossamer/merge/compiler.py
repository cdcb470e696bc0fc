"""From a mix to what the engine must apply: weighted members, and at most one delta more."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gossamer.merge.align import align
from gossamer.merge.errors import MissingMemberError, MixError
from gossamer.merge.methods import Parameters, method_named
from gossamer.merge.methods.spec import Combine, weighted_sum
from gossamer.merge.mix import Mix
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.values import ValueDtype, from_carrier

#: Above this share of the members' nonzeros, one merged delta is cheaper than a correction.
MAX_CORRECTION = 0.2


@dataclass(frozen=True)
class Compiled:
    """What a row with this mix runs with.

    Attributes:
        members: (digest, weight) to apply as they are; empty where `replaces` is given.
        correction: float32, to add with weight 1 beside the members.
        replaces: float32, to apply with weight 1 instead of the members.
    """

    members: tuple[tuple[str, float], ...]
    correction: DeltaSet | None = None
    replaces: DeltaSet | None = None


def compile_mix(
    mix: Mix, deltas: Mapping[str, DeltaSet], *, max_correction: float = MAX_CORRECTION
) -> Compiled:
    """The cheaper of the members with a correction, or one merged delta that replaces them.

    An elementwise method differs from the weighted sum only where members overlap. So the members
    are served as they are, each from its one packed copy, plus a correction there; when that has
    more than `max_correction` of the members' nonzeros together, the merged delta is cheaper. Both
    cost O(Σ nnz) in one thread that holds no interpreter lock in its long parts, and are
    deterministic: the same mix gives the same bits.

    The support of a member is its stored positions, zeros included; of a block its whole tile,
    clipped to the weight. Blocks of one size meet tile by tile and give blocks; other combinations
    are taken apart into entries.

    Args:
        mix: canonical; the base and `linear` mixes need no deltas.
        deltas: the members' deltas by digest; others are ignored.
        max_correction: share of the members' nonzeros.

    Raises:
        MissingMemberError: a member's deltas are needed and not given.
        MixError: the members were made for different bases (`base_model_mismatch`).
    """
    method = method_named(mix.method)
    members = tuple((member.digest, member.weight) for member in mix.members)
    given = [deltas[digest] for digest, _ in members if digest in deltas]
    base = _one_base(given)
    if method.combine is None or not members:
        return Compiled(members)
    for digest, _ in members:
        if digest not in deltas:
            raise MissingMemberError(digest)
    combine = functools.partial(_combine, method.combine, dict(mix.params))
    overlays = _Overlays(combine, given, [weight for _, weight in members])
    budget = max_correction * sum(delta_set.nnz for delta_set in given)
    record = {"mix": mix.digest}
    correction: dict[str, Delta] = {}
    for name, delta in overlays.corrections():
        correction[name] = delta
        budget -= delta.nnz
        if budget < 0:
            merged = DeltaSet(*base, dict(overlays.merged()), record)
            return Compiled((), replaces=merged)
    if not correction:
        return Compiled(members)
    return Compiled(members, correction=DeltaSet(*base, correction, record))


def _one_base(given: Sequence[DeltaSet]) -> tuple[str, str]:
    """Fingerprint and name of the base that all were made for."""
    named = {one.base_fingerprint: one.base_name for one in given if one.base_fingerprint}
    if len(named) > 1:
        names = ", ".join(sorted(named.values()))
        message = f"the members were made for different bases: {names}"
        raise MixError("base_model_mismatch", message, field="members")
    shapes: dict[str, tuple[int, int]] = {}
    for delta_set in given:
        for name, delta in delta_set.deltas.items():
            if shapes.setdefault(name, delta.shape) != delta.shape:
                message = f"the members disagree about the shape of {name}"
                raise MixError("base_model_mismatch", message, field="members")
    return next(iter(named.items()), ("", given[0].base_name if given else ""))


class _Part(NamedTuple):
    """One member's numbers for one weight."""

    positions: NDArray[np.int64]
    values: NDArray[Any]
    value_dtype: ValueDtype
    scale: float


class _Ground(NamedTuple):
    """All members' numbers for one weight, as entries or as tiles of one size."""

    shape: tuple[int, int]
    block_size: int
    parts: list[_Part]
    weights: NDArray[np.float64]


class _Overlay(NamedTuple):
    """The members laid over each other at some positions of a weight."""

    positions: NDArray[np.int64]
    values: NDArray[np.float32]
    present: NDArray[np.bool_]


_Combine = Callable[[_Overlay, NDArray[np.float64]], NDArray[np.float64]]


class _Overlays:
    """The members of one mix, weight by weight."""

    def __init__(
        self, combine: _Combine, members: Sequence[DeltaSet], weights: Sequence[float]
    ) -> None:
        self._combine = combine
        self._by_name: dict[str, list[tuple[Delta, float]]] = {}
        for delta_set, weight in zip(members, weights, strict=True):
            for name, delta in delta_set.deltas.items():
                self._by_name.setdefault(name, []).append((delta, weight))

    def corrections(self) -> Iterator[tuple[str, Delta]]:
        """What is missing from the weighted sum, where there is anything."""
        for name, deltas in sorted(self._by_name.items()):
            if len(deltas) < 2:
                continue
            ground = _common_ground(deltas)
            overlay = _lay_over(ground, least=2)
            if overlay.positions.size:
                merged = self._combine(overlay, ground.weights)
                merged -= weighted_sum(overlay.values, ground.weights)
                yield name, _delta(ground, overlay.positions, merged)

    def merged(self) -> Iterator[tuple[str, Delta]]:
        """The whole result."""
        for name, deltas in sorted(self._by_name.items()):
            ground = _common_ground(deltas)
            overlay = _lay_over(ground, least=1)
            yield name, _delta(ground, overlay.positions, self._combine(overlay, ground.weights))


def _combine(
    formula: Combine, params: Parameters, overlay: _Overlay, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    return formula(overlay.values, overlay.present, weights, params)


def _common_ground(deltas: Sequence[tuple[Delta, float]]) -> _Ground:
    """Tiles stay tiles where all are of one size; otherwise blocks are taken apart."""
    sizes = {delta.block_size for delta, _ in deltas}
    if len(sizes) == 1:
        parts = [_Part(d.positions, d.values, d.value_dtype, d.scale) for d, _ in deltas]
    else:
        parts = [_Part(*delta.elements(), "F32", 1.0) for delta, _ in deltas]
    weights = np.array([weight for _, weight in deltas], np.float64)
    return _Ground(deltas[0][0].shape, sizes.pop() if len(sizes) == 1 else 1, parts, weights)


def _lay_over(ground: _Ground, least: int) -> _Overlay:
    """The members at the positions that at least `least` of them hold."""
    capacity = math.prod(-(-side // ground.block_size) for side in ground.shape)
    found = align([part.positions for part in ground.parts], least, capacity)
    begins = [0, *found.ends[:-1]]
    stored = [
        part.values[found.entries[begin:end]]
        for part, begin, end in zip(ground.parts, begins, found.ends, strict=True)
    ]
    numbers = _as_f32(ground.parts, stored)
    shape, tile = (len(ground.parts), found.positions.size), numbers.shape[1:]
    values = np.zeros((math.prod(shape), *tile), np.float32)
    values[found.cells] = numbers
    present = np.zeros(math.prod(shape), np.bool_)
    present[found.cells] = True
    flat = (1,) * len(tile)
    return _Overlay(found.positions, values.reshape(*shape, *tile), present.reshape(*shape, *flat))


def _as_f32(parts: Sequence[_Part], stored: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Some stored values of each member, one after the other, scales applied."""
    dtypes = {part.value_dtype for part in parts}
    if len(dtypes) == 1 and all(part.scale == 1.0 for part in parts):
        return from_carrier(np.concatenate(stored), dtypes.pop())
    return np.concatenate(
        [
            from_carrier(some, part.value_dtype) * np.float32(part.scale)
            for part, some in zip(parts, stored, strict=True)
        ]
    )


def _delta(ground: _Ground, positions: NDArray[np.int64], values: NDArray[np.float64]) -> Delta:
    # The positions are a view of an array as long as all members together: let that one go.
    return Delta(
        kind="element" if ground.block_size == 1 else "block",
        shape=ground.shape,
        block_size=ground.block_size,
        positions=positions.copy(),
        values=values.astype("<f4"),
        value_dtype="F32",
    )
