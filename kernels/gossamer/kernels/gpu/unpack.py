"""Taking a packed delta apart again: what its buffer says, entry by entry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from gossamer.kernels.delta import PackedDelta
from gossamer.kernels.gpu import layout
from gossamer.kernels.gpu.layout import GROUP8, PAIR, SPLIT8, WORD

_Entries = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]


def entries(packed: PackedDelta) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """See `gossamer.kernels.delta.entries`; values as they were rounded when packed."""
    result = []
    for rows, columns, values in _parts(packed):
        boundaries = packed.record[layout.BOUNDARIES]
        projection = layout.projection_of(boundaries, torch.from_numpy(rows)).numpy()
        for p in np.unique(projection).tolist():
            mine = projection == p
            parts = (rows[mine], columns[mine], values[mine])
            result.append((p, *(torch.from_numpy(part) for part in parts)))
    return result


def _parts(packed: PackedDelta) -> Iterator[_Entries]:
    data, record = packed.data.cpu().numpy(), packed.record
    if record[layout.UNITS]:
        yield _element(data, packed)
    for i, side in enumerate(layout.TILE_SIDES):
        values, pointers, columns = record[layout.BLOCKS + 3 * i : layout.BLOCKS + 3 * i + 3]
        if values:
            yield _tiles(data, packed, side, (values, pointers, columns))


def _view(data: NDArray[np.uint8], offset: int, count: int, dtype: DTypeLike) -> NDArray[Any]:
    return np.frombuffer(data, dtype, count, offset)


def _floats(bits: NDArray[Any], packed: PackedDelta) -> NDArray[np.float32]:
    dtype = torch.float16 if packed.coding == "float16" else torch.bfloat16
    return torch.from_numpy(bits.astype(np.uint16)).view(dtype).float().numpy()


def _element(data: NDArray[np.uint8], packed: PackedDelta) -> _Entries:
    record, rows = packed.record, packed.shape[0]
    lengths = _view(data, record[layout.LENGTHS], rows, np.uint8).astype(np.int64)
    if record[layout.HIGH]:
        lengths += _view(data, record[layout.HIGH], rows, np.uint8).astype(np.int64) << 8
    count, form = int(lengths.sum()), record[layout.FORM]
    row = np.repeat(np.arange(rows), lengths)
    if form in (PAIR, WORD):
        units = _view(data, record[layout.UNITS], count, np.uint64 if form == PAIR else np.uint32)
        columns = (units & 0xFFFF).astype(np.int64)
        if form == PAIR:
            return row, columns, (units >> np.uint64(32)).astype(np.uint32).view(np.float32)
        return row, columns, _floats(units >> np.uint32(16), packed)
    if form == SPLIT8:
        columns = _view(data, record[layout.UNITS], count, np.uint16).astype(np.int64)
        values = _view(data, record[layout.VALUES8], count, np.int8).astype(np.float32)
    else:
        units = _view(data, record[layout.UNITS], 16 * count, np.uint8).reshape(count, 16)
        slots = layout.UNIT_ENTRIES[form]
        gaps = units[:, 2 : 1 + slots].astype(np.int64)
        head = units[:, :2].copy().view(np.uint16).astype(np.int64)
        columns = np.concatenate((head, gaps), axis=1).cumsum(axis=1)
        real = np.concatenate((np.ones((count, 1), bool), gaps > 0), axis=1)
        row = np.broadcast_to(row[:, None], columns.shape)[real]
        columns = columns[real]
        if form != GROUP8:
            return row, columns, _floats(units[:, 6:].copy().view(np.uint16)[real], packed)
        values = units[:, 8:15].view(np.int8)[real].astype(np.float32)
    scales = _view(data, record[layout.SCALES], rows, np.uint16)
    exact = torch.from_numpy(scales.copy()).view(torch.bfloat16).float().numpy()
    return row, columns, values * exact[row]


def _tiles(
    data: NDArray[np.uint8], packed: PackedDelta, side: int, offsets: tuple[int, int, int]
) -> _Entries:
    rows, columns = packed.shape
    down = -(-rows // side)
    pointers = _view(data, offsets[1], down + 1, np.int32)
    tiles = int(pointers[-1])
    tile_column = _view(data, offsets[2], tiles, np.uint16).astype(np.int64)
    width = 4 if packed.coding == "float32" else 2
    raw = _view(data, offsets[0], tiles * side * side * width, np.uint8)
    values = (raw.view(np.float32) if width == 4 else _floats(raw.view(np.uint16), packed)).reshape(
        tiles, side, side
    )
    inner = np.arange(side)
    row, column = np.broadcast_arrays(
        (np.repeat(np.arange(down), np.diff(pointers)) * side)[:, None, None] + inner[:, None],
        (tile_column * side)[:, None, None] + inner,
    )
    inside = (row < rows) & (column < columns) & (values != 0)
    return row[inside], column[inside], values[inside]
