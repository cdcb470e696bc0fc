"""Random deltas of odd and round shapes, and what they mean as dense matrices in float64."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gossamer.kernels import (
    Backend,
    BoundDeltas,
    Coding,
    PackedDelta,
    Piece,
    WorkPlan,
    bind,
    pack,
)

#: Those that run on the CPU of any machine.
HOST_BACKENDS: tuple[Backend, ...] = ("cpu", "reference")

#: Where the Triton kernels are tested: interpreted where there is no card, compiled where there is.
DEVICES = [
    pytest.param(
        "cpu",
        id="interpreter",
        marks=pytest.mark.skipif(
            not os.environ.get("TRITON_INTERPRET"), reason="the interpreter is off"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]

#: (out_features, in_features), round and odd.
SHAPES = [(576, 576), (576, 1536), (6, 42), (42, 6), (431, 123), (123, 431), (1040, 64), (1, 1)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def element_piece(
    rows: int,
    columns: int,
    density: float,
    g: torch.Generator,
    row_offset: int = 0,
    projection: int = 0,
) -> Piece:
    """Random entries, one row of them full (when there is any), the row before it empty."""
    mask = torch.rand(rows, columns, generator=g) < density
    if density > 0:
        full = int(torch.randint(rows, (1,), generator=g))
        mask[full] = True
        if rows > 1:
            mask[full - 1] = False
    positions = mask.flatten().nonzero().flatten()
    values = torch.randn(len(positions), generator=g)
    return Piece("element", projection, row_offset, rows, 1, positions, values)


def block_piece(
    rows: int,
    columns: int,
    density: float,
    side: int,
    g: torch.Generator,
    row_offset: int = 0,
    projection: int = 0,
) -> Piece:
    """Random tiles, zero where they hang over the edge."""
    across, down = -(-columns // side), -(-rows // side)
    positions = (torch.rand(across * down, generator=g) < density).nonzero().flatten()
    values = torch.randn(len(positions), side, side, generator=g)
    inner = torch.arange(side)
    row = (positions // across * side)[:, None, None] + inner[:, None]
    column = (positions % across * side)[:, None, None] + inner
    values[(row >= rows) | (column >= columns)] = 0
    return Piece("block", projection, row_offset, rows, side, positions, values)


def dense(pieces: Sequence[Piece], shape: tuple[int, int]) -> Tensor:
    """What pieces mean, (out, in) in float64; written without the packed layout."""
    total = torch.zeros(shape, dtype=torch.float64)
    for piece in pieces:
        side = piece.block_size
        across, down = -(-shape[1] // side), -(-piece.rows // side)
        if piece.kind == "element":
            part = torch.zeros(piece.rows * shape[1], dtype=torch.float64)
            part[piece.positions] = piece.values.double()
            part = part.view(piece.rows, shape[1])
        else:
            grid = torch.zeros(down * across, side, side, dtype=torch.float64)
            grid[piece.positions] = piece.values.double()
            part = grid.view(down, across, side, side).transpose(1, 2)
            part = part.reshape(down * side, across * side)[: piece.rows, : shape[1]]
        total[piece.row_offset : piece.row_offset + piece.rows] += part
    return total


def off_by_one(piece: Piece, limit: int) -> Piece:
    """The same piece with one position moved to a free neighbour."""
    positions = piece.positions.clone()
    taken = set(positions.tolist())
    for i, position in enumerate(positions.tolist()):
        for moved in (position + 1, position - 1):
            if 0 <= moved < limit and moved not in taken:
                positions[i] = moved
                return replace(piece, positions=positions)
    raise AssertionError("no position can be moved")


def expected(
    y: Tensor, x: Tensor, matrices: Sequence[Tensor | None], row_slots: Sequence[tuple[int, ...]],
    weights: Tensor, projection_of_row: Tensor,
) -> Tensor:  # fmt: skip
    """y plus every row's weighted products, in float64, row by row."""
    result = y.double()
    for t, slots in enumerate(row_slots):
        for j, slot in enumerate(slots):
            matrix = matrices[slot]
            if matrix is not None:
                row = weights[t, j].double()
                weight = row[projection_of_row] if len(row) > 1 else row
                result[t] += weight * (matrix @ x[t].double())
    return result


def poisoned(columns: int, row_slots: Sequence[tuple[int, ...]], g: torch.Generator) -> Tensor:
    """Random numbers for every row; NaN in the rows that run without members."""
    tensor = torch.randn(len(row_slots), columns, generator=g)
    tensor[[t for t, slots in enumerate(row_slots) if not slots]] = torch.nan
    return tensor


def bound(
    residents: Sequence[Sequence[Piece] | None],
    shape: tuple[int, int],
    projections: int = 1,
    backend: Backend = "cpu",
    coding: Coding = "float32",
    device: str = "cpu",
) -> BoundDeltas:
    """Packed and bound for a backend; "reference" takes the layout of "cpu"."""
    packed: list[PackedDelta | None] = []
    for pieces in residents:
        delta = None if pieces is None else pack(pieces, shape, projections, backend, coding)
        packed.append(None if delta is None else delta.moved(delta.data.to(device)))
    return bind(packed, shape, backend, device)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality that tells -0 from 0 and knows NaN."""
    kind = torch.int32 if left.dtype is torch.float32 else torch.int16
    return torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def plan_of(row_slots: Sequence[tuple[int, ...]], chunk_rows: int = 16) -> WorkPlan:
    return WorkPlan.build(row_slots, chunk_rows=chunk_rows)
