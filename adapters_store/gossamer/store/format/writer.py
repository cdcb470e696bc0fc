"""Write a `DeltaSet` as a packed adapter file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import Delta, DeltaSet, find_problem
from gossamer.store.errors import DeltaError
from gossamer.store.format.coding import encode_gaps, encode_planes, gaps_of
from gossamer.store.format.container import ITEM_BYTES, MAX_DEPTH, is_too_deep, render_header
from gossamer.store.format.layout import (
    MAX_MODULES,
    SHIFTS,
    Group,
    Layout,
    Module,
    group_label,
    render_layout,
)
from gossamer.store.format.limits import DEFAULT_LIMITS, MAX_HEADER_BYTES
from gossamer.store.format.seeded import seeded_positions

Coding = Literal["auto", "raw", "zstd"]

#: A group is closed at this many positions, so that decoding needs little more than its result.
_GROUP_POSITIONS = 1 << 20
#: Up to here a `raw` file has a pair of tensors for each weight, under the weight's own name.
_RAW_TENSORS = 1024


class Written(NamedTuple):
    """What was written: the sha256 of the bytes (hex) and their number."""

    blob_id: str
    size: int


class Sink(Protocol):
    """What takes a file's bytes: a file open for binary writing, a spool."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Append all of `data`."""


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: list[int]
    data: bytes | memoryview


def write(
    delta_set: DeltaSet,
    target: str | Path | Sink,
    *,
    coding: Coding = "auto",
    seeds: Mapping[str, int] | None = None,
) -> Written:
    """Write the packed file of docs/format.md; the same input gives the same bytes.

    Args:
        delta_set: what to write.
        target: a path, replaced if it exists, or what takes the bytes.
        coding: "raw" stores the numbers plainly; "zstd" compresses them; "auto" compresses unless
            the result would expand beyond what readers allow (an adapter of zeros).
        seeds: weight name → the seed that its positions come from (`seeded_positions`); only the
            seed is stored.

    Returns:
        The blob id and the size.

    Raises:
        DeltaError: a delta breaks its rules, a seed gives other positions, or the header would be
            larger, or the record deeper, than readers accept.
        ValueError, TypeError: the record holds what JSON cannot.
        OSError: the path cannot be written.
    """
    deltas = dict(sorted(delta_set.deltas.items(), key=lambda item: item[0].encode()))
    seeds = dict(seeds or {})
    _check(deltas, seeds)
    if is_too_deep(delta_set.record):
        raise DeltaError(f"the training record has more than {MAX_DEPTH} levels")
    compressed = coding != "raw"
    header, tensors = _render(delta_set, deltas, seeds, compressed)
    if coding == "auto" and _expands_too_far(deltas, header, tensors):
        header, tensors = _render(delta_set, deltas, seeds, compressed=False)
    if isinstance(target, str | Path):
        with Path(target).open("wb") as file:
            return _emit(file, header, tensors)
    return _emit(target, header, tensors)


def _emit(file: Sink, header: bytes, tensors: list[_Tensor]) -> Written:
    state, size = hashlib.sha256(), 0
    for data in (header, *(tensor.data for tensor in tensors)):
        state.update(data)
        file.write(data)
        size += len(data)
    return Written(state.hexdigest(), size)


def _check(deltas: Mapping[str, Delta], seeds: Mapping[str, int]) -> None:
    if len(deltas) > MAX_MODULES:
        raise DeltaError(f"{len(deltas)} weights, at most {MAX_MODULES} fit into a file")
    for name, delta in deltas.items():
        problem = find_problem(delta)
        if problem is not None:
            raise DeltaError(f"{name}: {problem.message}", tensor=name, position=problem.position)
    for name, seed in seeds.items():
        if name not in deltas:
            raise DeltaError(f"{name} has a seed but no delta", tensor=name)
        delta = deltas[name]
        capacity = delta.grid[0] * delta.grid[1]
        expected = seeded_positions(seed, name, capacity, delta.positions.size)
        if not np.array_equal(expected, delta.positions):
            raise DeltaError(f"the positions of {name} do not come from seed {seed}", tensor=name)


def _render(
    delta_set: DeltaSet, deltas: Mapping[str, Delta], seeds: Mapping[str, int], compressed: bool
) -> tuple[bytes, list[_Tensor]]:
    groups: list[Group] = []
    tensors: list[_Tensor] = []
    for names in _batches(deltas, seeds, compressed):
        group = _describe({name: deltas[name] for name in names}, seeds, compressed, len(groups))
        members = [deltas[name] for name in names]
        if group.positions == "gaps":
            group, coded = _code_gaps(group, members)
            tensors += coded
        elif group.positions == "raw":
            tensors.append(_raw_positions(group, members))
        tensors += _values(group, members)
        groups.append(group)
    # Widest items first: then every tensor is aligned, for readers that map the file.
    tensors.sort(key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name.encode()))
    layout = Layout(
        delta_set.base_fingerprint, delta_set.base_name, tuple(groups), delta_set.record
    )
    header = render_header(
        render_layout(layout), {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    )
    if len(header) - 8 > MAX_HEADER_BYTES:
        raise DeltaError(f"a header of {len(header)} bytes: the training record is too long")
    return header, tensors


def _batches(
    deltas: Mapping[str, Delta], seeds: Mapping[str, int], compressed: bool
) -> Iterator[list[str]]:
    """The names of each group: like weights, in byte order, up to a number of positions."""
    target = 0 if not compressed and len(deltas) <= _RAW_TENSORS else _GROUP_POSITIONS

    def kind(name: str) -> tuple[str, int, str, bool]:
        delta = deltas[name]
        return (delta.kind, delta.block_size, delta.value_dtype, name in seeds)

    for _, like in groupby(sorted(deltas, key=lambda name: (kind(name), name.encode())), key=kind):
        batch: list[str] = []
        held = 0
        for name in like:
            size = deltas[name].values.size
            if batch and held + size > target:
                yield batch
                batch, held = [], 0
            batch.append(name)
            held += size
        yield batch


def _describe(
    deltas: Mapping[str, Delta], seeds: Mapping[str, int], compressed: bool, index: int
) -> Group:
    modules = tuple(
        Module(name, delta.shape, delta.positions.size, delta.nnz, _f32(delta), seeds.get(name))
        for name, delta in deltas.items()
    )
    first = next(iter(deltas.values()))
    seeded = modules[0].seed is not None
    return Group(
        label=group_label(modules, index),
        kind=first.kind,
        block_size=first.block_size,
        value_dtype=first.value_dtype,
        positions="seed" if seeded else "gaps" if compressed else "raw",
        values="planes" if compressed else "raw",
        modules=modules,
    )


def _f32(delta: Delta) -> float:
    return float(np.float32(delta.scale))


def _code_gaps(group: Group, deltas: list[Delta]) -> tuple[Group, list[_Tensor]]:
    coded = encode_gaps(np.concatenate([gaps_of(delta.positions) for delta in deltas]), SHIFTS)
    prefix = f"{group.label}.positions"
    tensors = [_frame(f"{prefix}.high{index}", data) for index, data in enumerate(coded.high)]
    if coded.low is not None:
        tensors.append(_frame(f"{prefix}.low", coded.low))
    return replace(group, shift=coded.shift, high_planes=len(coded.high)), tensors


def _raw_positions(group: Group, deltas: list[Delta]) -> _Tensor:
    narrow = all(delta.shape[0] * delta.shape[1] <= 2**31 for delta in deltas)
    positions = np.concatenate([delta.positions for delta in deltas])
    carried = positions.astype("<i4" if narrow else "<i8")
    dtype = "I32" if narrow else "I64"
    return _Tensor(f"{group.label}.positions", dtype, [carried.size], _bytes(carried))


def _values(group: Group, deltas: list[Delta]) -> list[_Tensor]:
    values = np.concatenate([delta.values for delta in deltas])
    name = f"{group.label}.values"
    if group.values == "raw":
        return [_Tensor(name, group.value_dtype, list(values.shape), _bytes(values))]
    return [
        _frame(f"{name}.plane{index}", data) for index, data in enumerate(encode_planes(values))
    ]


def _frame(name: str, data: bytes) -> _Tensor:
    return _Tensor(name, "U8", [len(data)], data)


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.data.cast("B") if array.size else memoryview(b"")


def _expands_too_far(deltas: Mapping[str, Delta], header: bytes, tensors: list[_Tensor]) -> bool:
    decoded = sum(8 * delta.positions.size + delta.values.nbytes for delta in deltas.values())
    size = len(header) + sum(len(tensor.data) for tensor in tensors)
    limits = DEFAULT_LIMITS
    return decoded > max(limits.free_decoded_bytes, limits.max_expansion * size)
