"""Random deltas of exactly the density that is asked for."""

from __future__ import annotations

import torch

from benchmarks.kernels.bench import MODEL
from benchmarks.roofline.models import Weight
from gossamer.kernels import BoundDeltas, PackedDelta, Piece, bind, pack

#: The side of a tile.
TILE = 16


def random_piece(
    kind: str, rows: int, columns: int, density: float, offset: int, projection: int
) -> Piece:
    """A delta of one projection: a random mask, of tiles for "block"."""
    side = TILE if kind == "block" else 1
    cells = rows * columns // side**2
    count = max(1, round(cells * density))
    positions = torch.randperm(cells)[:count].sort().values
    shape = (count, side, side) if kind == "block" else (count,)
    values = torch.randn(shape)
    return Piece("block" if kind == "block" else "element", projection, offset, rows, side,
                 positions, values)  # fmt: skip


def random_pieces(kind: str, weight: Weight, density: float) -> list[Piece]:
    """One piece for every packed projection."""
    pieces, offset = [], 0
    for projection, rows in enumerate(weight.projections):
        pieces.append(random_piece(kind, rows, weight.columns, density, offset, projection))
        offset += rows
    return pieces


def packed(pieces: list[Piece], weight: Weight) -> PackedDelta:
    """A weight's pieces as the kernels read them."""
    return pack(pieces, (weight.rows, weight.columns), len(weight.projections))


def random_delta(kind: str, weight: Weight, density: float) -> PackedDelta:
    """A delta of all packed projections of a weight."""
    return packed(random_pieces(kind, weight, density), weight)


def residents(kind: str, density: float, count: int) -> list[list[BoundDeltas]]:
    """`count` adapters on every weight of every layer."""
    return [
        [
            bind([random_delta(kind, w, density) for _ in range(count)], (w.rows, w.columns))
            for w in MODEL.weights
        ]
        for _ in range(MODEL.layers)
    ]
