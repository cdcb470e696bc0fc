"""From the tensors of a group to its deltas; sizes were checked against the limits before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import CARRIER, Delta
from gossamer.store.format.coding import decode_gaps, decode_planes, decompress, low_bytes
from gossamer.store.format.container import TensorInfo
from gossamer.store.format.layout import Group
from gossamer.store.format.seeded import seeded_positions
from gossamer.store.format.source import Source

_POSITION_DTYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


class Run(NamedTuple):
    """The deltas of a group, in order, and the arrays that theirs are consecutive parts of."""

    deltas: list[Delta]
    positions: NDArray[np.int64]
    values: NDArray[Any]


def decode_group(source: Source, tensors: Mapping[str, TensorInfo], group: Group) -> Run:
    """The deltas of the group's modules; their content is not yet checked.

    Raises:
        AdapterFileError: a compressed tensor is damaged or of another size than declared.
    """
    stored = _Tensors(source, tensors)
    positions, values = _positions(stored, group), _values(stored, group)
    deltas, begin = [], 0
    for module in group.modules:
        run = slice(begin, begin + module.count)
        begin += module.count
        deltas.append(
            Delta(
                kind=group.kind,
                shape=module.shape,
                block_size=group.block_size,
                positions=positions[run],
                values=values[run],
                value_dtype=group.value_dtype,
                scale=module.scale,
            )
        )
    return Run(deltas, positions, values)


class _Tensors:
    """The tensors of the file by name."""

    def __init__(self, source: Source, tensors: Mapping[str, TensorInfo]) -> None:
        self._source = source
        self._tensors = tensors

    def plain(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.frombuffer(self._bytes(name), dtype)

    def frame(self, name: str, size: int) -> NDArray[np.uint8]:
        return decompress(self._bytes(name), size, name)

    def dtype(self, name: str) -> str:
        return self._tensors[name].dtype

    def _bytes(self, name: str) -> bytes:
        info = self._tensors[name]
        return self._source.read_at(info.offset, info.nbytes)


def _positions(stored: _Tensors, group: Group) -> NDArray[np.int64]:
    name = f"{group.label}.positions"
    if group.positions == "raw":
        # A copy in any case: what is handed out is writable and shares nothing with the file.
        return stored.plain(name, _POSITION_DTYPES[stored.dtype(name)]).astype(np.int64)
    positions = np.empty(group.count, np.int64)
    if group.positions == "seed":
        begin = 0
        for module in group.modules:
            capacity = math.prod(-(-side // group.block_size) for side in module.shape)
            drawn = seeded_positions(module.seed or 0, module.name, capacity, module.count)
            positions[begin : begin + module.count] = drawn
            begin += module.count
        return positions
    high = [stored.frame(f"{name}.high{index}", group.count) for index in range(group.high_planes)]
    low = None
    if group.shift:
        low = stored.frame(f"{name}.low", low_bytes(group.count, group.shift))
    positions[:] = decode_gaps(low, high, group.shift, group.count)
    # One sum over all modules, that begins anew with each: the sum of the one before is taken off
    # its first step. What wraps, wraps to the same number.
    counts = np.array([module.count for module in group.modules], np.int64)
    ends = np.cumsum(counts)[counts > 0]
    starts = ends - counts[counts > 0]
    if starts.size:
        totals = np.add.reduceat(positions, starts)
        positions[starts[1:]] -= totals[:-1]
        positions[0] -= 1
        np.cumsum(positions, out=positions)
    return positions


def _values(stored: _Tensors, group: Group) -> NDArray[Any]:
    name, dtype = f"{group.label}.values", CARRIER[group.value_dtype]
    if group.values == "raw":
        return stored.plain(name, dtype).reshape(group.value_shape).copy()
    size = math.prod(group.value_shape)
    planes = [stored.frame(f"{name}.plane{index}", size) for index in range(dtype.itemsize)]
    return decode_planes(planes, dtype).reshape(group.value_shape)
