"""The rows of a step in memory: whole tiles of rows, so that no kernel has to treat the last ones
apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

#: Rows that a product takes at once.
TILE_ROWS = 8


def filled(rows: int) -> int:
    """So many rows, up to a whole tile."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


def new_rows(rows: int, width: int) -> Tensor:
    """Uninitialised float32 [rows, width]; zeros lie behind it, up to a whole tile."""
    if filled(rows) == rows:
        return torch.empty(rows, width)
    return torch.zeros(filled(rows), width)[:rows]


def in_whole_tiles(x: Tensor) -> Tensor:
    """x [rows, width] contiguous, and readable up to a whole tile of rows; a copy if need be.

    What lies behind x is anybody's; a product of it is too, and nobody reads that.
    """
    x = x.contiguous()
    rows, width = x.shape
    end = 4 * (x.storage_offset() + filled(rows) * width)
    if x.untyped_storage().nbytes() >= end:
        return x
    return functional.pad(x, (0, 0, 0, filled(rows) - rows))
