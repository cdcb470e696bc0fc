"""Deltas on the device: pieces are packed once, and bound to a weight when the residents change."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.kernels.backends import Backend, implementation
from gossamer.kernels.errors import PackError, ShapeError
from gossamer.kernels.layout import MAX_COLUMNS, TILE_SIDES, block_rows

#: What the Python objects of one packed delta take beside its buffer, in bytes: measured as growth
#: of the resident set over 20 000 of them.
OBJECT_BYTES = 512

#: Words of `BoundDeltas.table` in front of the addresses.
TABLE_WORDS = 5


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """One delta, placed inside a patched weight.

    A patched weight is what the engine multiplies with: q, k and v are packed into one, gate and
    up into another. A piece covers the rows [row_offset, row_offset + rows) and all columns.

    Attributes:
        kind: "element" (single entries) or "block" (dense tiles).
        projection: which of the packed projections it belongs to; picks its weight in `apply`.
        row_offset, rows: where it lies in the patched weight's output rows.
        block_size: side B of a tile; ignored for "element".
        positions: int64 [n], strictly increasing. "element": row * in_features + column inside the
            piece. "block": index of the tile, row-major over the ceil(rows / B) × ceil(in / B)
            grid of the piece.
        values: float32 [n], or [n, B, B] with rows first; what a ragged tile holds outside the
            piece must be 0.
    """

    kind: Literal["element", "block"]
    projection: int
    row_offset: int
    rows: int
    block_size: int
    positions: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class PackedDelta:
    """All of one adapter's pieces on one patched weight, in the device's layout (`layout`).

    Attributes:
        shape: (out_features, in_features) of the patched weight.
        projections: number of packed projections of the weight.
        nnz: stored entries; tiles are counted whole, clipped at the edges of their piece.
        data: the buffer, uint8.
    """

    shape: tuple[int, int]
    projections: int
    nnz: int
    data: Tensor

    @property
    def nbytes(self) -> int:
        """Memory that the packed delta occupies, in bytes, Python objects included."""
        return self.data.nbytes + OBJECT_BYTES


@dataclass(frozen=True, eq=False, slots=True)
class BoundDeltas:
    """The resident deltas of one patched weight, addressed by slot.

    Attributes:
        shape: (out_features, in_features) of the patched weight.
        deltas: by slot; None where a resident does not touch this weight. Holds them in memory.
        table: int64 [5 + slots]: out_features, in_features, rows of a row block, row blocks,
            entries over all slots; then the address of each packed buffer, 0 for None.
        nnz: entries over all slots; of a `room`, the most there can be.
        projections: packed projections of the weight.
    """

    shape: tuple[int, int]
    deltas: tuple[PackedDelta | None, ...]
    table: Tensor
    nnz: int
    projections: int

    @property
    def is_empty(self) -> bool:
        """Whether no resident touches the weight."""
        return self.nnz == 0

    @classmethod
    def room(cls, shape: tuple[int, int], projections: int, slots: int) -> BoundDeltas:
        """Bound deltas of which only the table's memory matters: for up to so many slots."""
        empty = bind([None] * slots, shape)
        return cls(shape, empty.deltas, empty.table, sys.maxsize, projections)

    def hold(self, bound: BoundDeltas | None) -> None:
        """Semantics: `table` says what `bound` says; the caller keeps the deltas in memory.

        Raises:
            ShapeError: it has another shape, or more slots.
        """
        words = len(self.table) if bound is None else len(bound.table)
        if bound is not None and (bound.shape != self.shape or words > len(self.table)):
            expected = f"{self.shape} with at most {len(self.deltas)} slots"
            raise ShapeError("bound", expected, (bound.shape, len(bound.deltas)))
        self.table[TABLE_WORDS - 1 :] = 0
        if bound is not None:
            self.table[:words] = bound.table


def pack(
    pieces: Sequence[Piece],
    shape: tuple[int, int],
    projections: int = 1,
    backend: Backend = "cpu",
) -> PackedDelta:
    """Semantics: Δ[p.row_offset + r, c] += p.values at p.positions, for every piece p.

    Checks order and bounds of every position again, whoever has checked them before. Runs without
    the GIL ("cpu"); both backends write the same bytes.

    Args:
        pieces: any mix of kinds; they may be empty, and they may overlap (the sum is taken in their
            order).
        shape: (out_features, in_features) of the patched weight.
        projections: how many projections are packed into it.
        backend: "cpu" (compiled) or "reference" (numpy).

    Raises:
        PackError: naming the piece and the position that is out of range, out of order, or
            otherwise cannot be placed.
        BackendUnavailableError: see `implementation`.
    """
    for i, piece in enumerate(pieces):
        _check_piece(i, piece, shape, projections)
    nnz, data = implementation(backend, "packing").pack(pieces, shape)
    return PackedDelta(shape, projections, nnz, data)


def bind(deltas: Sequence[PackedDelta | None], shape: tuple[int, int]) -> BoundDeltas:
    """Binds the resident deltas of one patched weight; a delta's index is its slot.

    Cheap: nothing is copied or stacked, only addresses are noted.

    Raises:
        ShapeError: a delta was packed for another shape or another number of projections.
    """
    present = [d for d in deltas if d is not None]
    for delta in present:
        if delta.shape != shape or delta.projections != present[0].projections:
            raise ShapeError(
                "deltas",
                f"packed for {shape} with {present[0].projections} projections",
                (delta.shape, delta.projections),
            )
    per_block = block_rows(shape[0])
    nnz = sum(d.nnz for d in present)
    table = [*shape, per_block, -(-shape[0] // per_block), nnz]
    table += [0 if d is None else d.data.data_ptr() for d in deltas]
    return BoundDeltas(
        shape=shape,
        deltas=tuple(deltas),
        table=torch.tensor(table, dtype=torch.int64),
        nnz=nnz,
        projections=present[0].projections if present else 1,
    )


def entries(packed: PackedDelta) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """What a packed delta holds, piece by piece within each row block, in the order of summation.

    Returns:
        (projection, rows, columns, values): absolute int64 rows and columns, float32 values.
        Tiles come as their entries, clipped at the edges.
    """
    result: list[tuple[int, Tensor, Tensor, Tensor]] = implementation(
        "reference", "packing"
    ).entries(packed)
    return result


def add_dense(target: Tensor, packed: PackedDelta, weights: Sequence[float] = (1.0,)) -> None:
    """Semantics: target += weights[projection] * Δ, in fp32; target is (out, in), in place.

    Args:
        target: any float dtype; rounded once, after the sum.
        packed: the delta.
        weights: one per packed projection, or one for all.

    Raises:
        ShapeError: `target` has another shape than the delta.
    """
    if tuple(target.shape) != packed.shape:
        raise ShapeError("target", f"of shape {packed.shape}", tuple(target.shape))
    total = target.float()
    for projection, rows, columns, values in entries(packed):
        weight = weights[projection if len(weights) > 1 else 0]
        total.index_put_((rows, columns), values * weight, accumulate=True)
    if total is not target:
        target.copy_(total)


def to_dense(packed: PackedDelta) -> Tensor:
    """The delta as a dense float32 (out_features, in_features) tensor."""
    dense = torch.zeros(packed.shape)
    add_dense(dense, packed)
    return dense


def _check_piece(index: int, piece: Piece, shape: tuple[int, int], projections: int) -> None:
    """Everything about a piece but its positions."""
    out_features, in_features = shape
    if not 0 < in_features <= MAX_COLUMNS:
        raise PackError(index, None, f"in_features must be in [1, {MAX_COLUMNS}], is {in_features}")
    if piece.row_offset < 0 or piece.rows < 0 or piece.row_offset + piece.rows > out_features:
        end = piece.row_offset + piece.rows
        raise PackError(index, None, f"rows [{piece.row_offset}, {end}) of {out_features}")
    if not 0 <= piece.projection < projections:
        raise PackError(index, None, f"projection {piece.projection} of {projections}")
    count = len(piece.positions)
    side = piece.block_size
    if piece.kind == "block" and side < 1:
        raise PackError(index, None, f"block size {side}")
    expected = (count,) if piece.kind == "element" else (count, side, side)
    for name, tensor, dtype, form in (
        ("positions", piece.positions, torch.int64, (count,)),
        ("values", piece.values, torch.float32, expected),
    ):
        if tensor.dtype is not dtype or tuple(tensor.shape) != form or not tensor.is_cpu:
            raise PackError(
                index,
                None,
                f"{name} must be {dtype} {form} on the CPU, "
                f"are {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}",
            )


def as_elements(piece: Piece, in_features: int) -> Piece:
    """A block piece whose tiles no kernel reads directly (see `TILE_SIDES`), as single entries."""
    if piece.kind == "element" or piece.block_size in TILE_SIDES:
        return piece
    side = piece.block_size
    across = -(-in_features // side)
    inner = torch.arange(side)
    rows = (piece.positions // across * side)[:, None, None] + inner[:, None]
    columns = (piece.positions % across * side)[:, None, None] + inner
    inside = (rows < piece.rows) & (columns < in_features)
    positions = (rows * in_features + columns)[inside]
    positions, order = positions.sort()
    return Piece(
        "element",
        piece.projection,
        piece.row_offset,
        piece.rows,
        1,
        positions,
        piece.values[inside][order],
    )
