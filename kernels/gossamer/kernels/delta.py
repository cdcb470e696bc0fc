"""Deltas on the device: pieces are packed once, and bound to a weight when the residents change."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from gossamer.kernels.backends import Backend, implementation
from gossamer.kernels.errors import PackError, ShapeError
from gossamer.kernels.layout import MAX_COLUMNS, TILE_SIDES, block_rows

#: What the Python objects of one packed delta take beside its buffer, in bytes: measured as growth
#: of the resident set over 20 000 of them.
OBJECT_BYTES = 512

#: Words of `BoundDeltas.table` in front of the addresses, on the CPU.
TABLE_WORDS = 5

#: How values are stored: "float32" exactly; the others where a device trades digits for bytes.
Coding = Literal["float32", "bfloat16", "float16", "int8"]

#: The coding that a step of a dtype reads exactly as it was packed.
EXACT_CODINGS: Final[Mapping[torch.dtype, Coding]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


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
    """All of one adapter's pieces on one patched weight, in the device's layout.

    Attributes:
        shape: (out_features, in_features) of the patched weight.
        projections: number of packed projections of the weight.
        nnz: stored entries; tiles are counted whole, clipped at the edges of their piece.
        data: the buffer, uint8, on the host or on the device.
        coding: how its values are stored.
        record: "triton": where the parts lie in the buffer (`gpu.layout`). Empty for the layout of
            the other backends (`layout`), which says so itself.
    """

    shape: tuple[int, int]
    projections: int
    nnz: int
    data: Tensor
    coding: Coding = "float32"
    record: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Memory that the packed delta occupies, in bytes, Python objects included."""
        return self.data.nbytes + OBJECT_BYTES

    def moved(self, data: Tensor) -> PackedDelta:
        """The same delta, its buffer's bytes copied to another place."""
        return replace(self, data=data)


@dataclass(frozen=True, eq=False, slots=True)
class BoundDeltas:
    """The resident deltas of one patched weight, addressed by slot.

    Attributes:
        shape: (out_features, in_features) of the patched weight.
        deltas: by slot; None where a resident does not touch this weight, or a slot is free. Holds
            them in memory.
        table: int64, what the kernels read. On the CPU [5 + slots]: out_features, in_features, rows
            of a row block, row blocks, entries over all slots; then the address of each packed
            buffer, 0 for None. "triton": on the device [slots, words], a record by slot
            (`gpu.layout`), rows contiguous.
        nnz: entries over all slots; of a `room`, the most there can be.
        projections: packed projections of the weight.
        backend: whose table it is.
        coding: of all deltas.
        sides: sides of the tiles that there are, from small to large; "triton" only.
    """

    shape: tuple[int, int]
    deltas: Sequence[PackedDelta | None]
    table: Tensor
    nnz: int
    projections: int
    backend: Backend = "cpu"
    coding: Coding = "float32"
    sides: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether no resident touches the weight."""
        return self.nnz == 0

    @property
    def slots(self) -> int:
        """How many slots there are."""
        return len(self.deltas)

    @classmethod
    def room(cls, shape: tuple[int, int], projections: int, slots: int) -> BoundDeltas:
        """Bound deltas of which only the table's memory matters: for up to so many slots, "cpu"."""
        return replace(bind([None] * slots, shape), nnz=sys.maxsize, projections=projections)

    @classmethod
    def of_table(
        cls,
        table: Tensor,
        shape: tuple[int, int],
        projections: int,
        coding: Coding,
        deltas: Sequence[PackedDelta | None],
    ) -> BoundDeltas:
        """A table that somebody else fills, with `records` of what he keeps in memory: "triton".

        Args:
            table: int64 [slots, words], rows contiguous.
            shape, projections: of the patched weight.
            coding: of everything that will be bound.
            deltas: by slot, what it holds on this weight by then.
        """
        return cls(shape, deltas, table, sys.maxsize, projections, "triton", coding)

    def with_sides(self, sides: tuple[int, ...]) -> BoundDeltas:
        """The same, tiles of these sides included."""
        return replace(self, sides=sides)

    def hold(self, bound: BoundDeltas | None) -> None:
        """Semantics: `table` says what `bound` says; the caller keeps the deltas in memory.

        Raises:
            ShapeError: it has another shape or backend, or more slots.
        """
        words = len(self.table) if bound is None else len(bound.table)
        if bound is not None and (
            (bound.shape, bound.backend) != (self.shape, self.backend) or words > len(self.table)
        ):
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
    coding: Coding = "float32",
) -> PackedDelta:
    """Semantics: Δ[p.row_offset + r, c] += p.values at p.positions, for every piece p.

    Checks order and bounds of every position again, whoever has checked them before. Runs on the
    host, without the GIL where numba is installed ("cpu" needs it; "triton" does without, for a few
    array operations at a time). "cpu" and "reference" write the same bytes.

    Args:
        pieces: any mix of kinds; they may be empty, and they may overlap (the sum is taken in their
            order).
        shape: (out_features, in_features) of the patched weight.
        projections: how many projections are packed into it.
        backend: "triton", "cpu" (compiled) or "reference" (numpy).
        coding: how values are stored: "float32" is exact, "bfloat16" and "float16" round each value
            once, "int8" to a 254th of the largest of its row, at most. "cpu" and "reference" have
            "float32" only.

    Raises:
        PackError: naming the piece and the position that is out of range, out of order, or
            otherwise cannot be placed.
        ShapeError: the backend has no such coding.
        BackendUnavailableError: see `implementation`.
    """
    for i, piece in enumerate(pieces):
        _check_piece(i, piece, shape, projections)
    packing = implementation(backend, "packing")
    if backend == "triton":
        nnz, data, record = packing.pack(pieces, shape, coding)
        return PackedDelta(shape, projections, nnz, data, coding, record)
    if coding != "float32":
        raise ShapeError("coding", f"float32 for {backend!r}", coding)
    nnz, data = packing.pack(pieces, shape)
    return PackedDelta(shape, projections, nnz, data)


def bind(
    deltas: Sequence[PackedDelta | None],
    shape: tuple[int, int],
    backend: Backend = "cpu",
    device: torch.device | str = "cpu",
) -> BoundDeltas:
    """Binds the resident deltas of one patched weight; a delta's index is its slot.

    Cheap: nothing is copied or stacked, only addresses are noted.

    Args:
        deltas: by slot, None where a resident does not touch the weight.
        shape: (out_features, in_features) of the patched weight.
        backend: whose layout the deltas have; "reference" has that of "cpu".
        device: where their buffers are, and the table will be.

    Raises:
        ShapeError: a delta was packed for another shape, another number of projections or another
            backend, or its buffer is elsewhere.
    """
    present = [d for d in deltas if d is not None]
    for delta in present:
        if delta.shape != shape or delta.projections != present[0].projections:
            raise ShapeError(
                "deltas",
                f"packed for {shape} with {present[0].projections} projections",
                (delta.shape, delta.projections),
            )
        if bool(delta.record) != (backend == "triton"):
            raise ShapeError("deltas", f"packed for {backend!r}", "the other layout")
        if delta.coding != present[0].coding:
            raise ShapeError("deltas", f"of coding {present[0].coding}", delta.coding)
        if delta.data.device.type != torch.device(device).type:
            raise ShapeError("deltas", f"on {device}", delta.data.device)
    nnz = sum(d.nnz for d in present)
    sides: tuple[int, ...] = ()
    if backend == "triton":
        sides = sides_of(present)
        table = records(deltas)
    else:
        per_block = block_rows(shape[0])
        words = [*shape, per_block, -(-shape[0] // per_block), nnz]
        words += [0 if d is None else d.data.data_ptr() for d in deltas]
        table = torch.tensor(words, dtype=torch.int64)
    return BoundDeltas(
        shape=shape,
        deltas=tuple(deltas),
        table=table.to(device, non_blocking=True),
        nnz=nnz,
        projections=present[0].projections if present else 1,
        backend=backend,
        coding=present[0].coding if present else "float32",
        sides=sides,
    )


def records(deltas: Sequence[PackedDelta | None]) -> Tensor:
    """int64 [deltas, words]: what the kernels' tables say of each, zeros for None ("triton").

    The deltas' buffers must stay where they are for as long as a table says so.
    """
    found = [None if d is None else (d.record, d.data.data_ptr()) for d in deltas]
    table: Tensor = implementation("triton", "packing").table(found)
    return table


def sides_of(deltas: Iterable[PackedDelta]) -> tuple[int, ...]:
    """Sides of the tiles that packed deltas have, from small to large ("triton")."""
    found = [delta.record for delta in deltas if delta.record]
    if not found:
        return ()
    sides: tuple[int, ...] = implementation("triton", "packing").sides(found)
    return sides


def entries(packed: PackedDelta) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """What a packed delta holds, piece by piece within each row block, in the order of summation.

    Returns:
        (projection, rows, columns, values): absolute int64 rows and columns, float32 values.
        Tiles come as their entries, clipped at the edges.
    """
    reader = (
        implementation("triton", "unpack")
        if packed.record
        else implementation("reference", "packing")
    )
    result: list[tuple[int, Tensor, Tensor, Tensor]] = reader.entries(packed)
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


def as_elements(piece: Piece, in_features: int, sides: Collection[int] = TILE_SIDES) -> Piece:
    """A block piece whose tiles no kernel reads directly (not of `sides`), as single entries."""
    if piece.kind == "element" or piece.block_size in sides:
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
