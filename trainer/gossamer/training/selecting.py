"""Choosing exactly k positions by their scores, over one weight or over many together.

By counting the bits of the scores instead of sorting them: two passes and 64 Ki counters find the
k-th largest of any number of weights, one weight at a time, and the answer is the same on every
machine. Equal scores are taken in order: of the weights as they are listed, then of positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.training.errors import NotANumberError

_BUCKETS = 1 << 16


@dataclass(frozen=True)
class Chosen:
    """The best positions of some weights.

    Attributes:
        positions: weight → int64, sorted; a weight without any is left out.
        tied: how many were taken because of their place among others with the score of the last.
    """

    positions: Mapping[str, Tensor]
    tied: int


def largest(
    scores: Mapping[str, Tensor], k: int, allowed: Mapping[str, Tensor] | None = None
) -> Chosen:
    """The k positions with the largest scores, over all weights together.

    Args:
        scores: by weight, float32 of any shape; positions count its elements in row-major order.
        k: at least 1, at most the number of allowed positions.
        allowed: by weight, bool of the same shape; where it is False nothing is chosen. A weight
            that is absent is allowed everywhere.

    Raises:
        NotANumberError: a score is not one.
        ValueError: k is out of range.
    """
    allowed = {n: m.to(scores[n].device) for n, m in (allowed or {}).items() if n in scores}
    high = torch.zeros(_BUCKETS, dtype=torch.int64)
    for name, score in scores.items():
        high += _counts(_keys(score) >> 16, allowed.get(name))
    if not 0 < k <= int(high.sum()):
        raise ValueError(f"{k} positions of {int(high.sum())}")
    bucket, above = _bucket_of(high, k)
    low = torch.zeros(_BUCKETS, dtype=torch.int64)
    for name, score in scores.items():
        inside = _in_bucket(score, bucket, allowed.get(name))
        low += _counts((_keys(score) & 0xFFFF) - _BUCKETS // 2, inside)
    rest, more = _bucket_of(low, k - above)
    threshold = (bucket << 16) + rest + _BUCKETS // 2
    missing = k - above - more
    found: dict[str, Tensor] = {}
    left = missing
    for name, score in scores.items():
        keys = _keys(score)
        mask = keys > threshold
        equal = keys == threshold
        if name in allowed:
            mask &= allowed[name].reshape(-1)
            equal &= allowed[name].reshape(-1)
        ties = equal.nonzero().reshape(-1)[:left]
        left -= ties.numel()
        mask[ties] = True
        positions = mask.nonzero().reshape(-1)
        if positions.numel():
            found[name] = positions
    equals = int(low[rest + _BUCKETS // 2])
    return Chosen(found, missing if missing < equals else 0)


def _keys(scores: Tensor) -> Tensor:
    """int32 numbers in the order of the scores; 0 and -0 are one."""
    flat = scores.detach().reshape(-1).float() + 0.0
    if bool(flat.isnan().any()):
        raise NotANumberError
    bits = flat.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _counts(halves: Tensor, among: Tensor | None) -> Tensor:
    """How often each number of 16 bits, -32768 … 32767, occurs."""
    if among is not None:
        halves = halves[among.reshape(-1)]
    return torch.bincount(halves.to(torch.int64) + _BUCKETS // 2, minlength=_BUCKETS).cpu()


def _in_bucket(scores: Tensor, bucket: int, among: Tensor | None) -> Tensor:
    inside = (_keys(scores) >> 16) == bucket
    return inside if among is None else inside & among.reshape(-1)


def _bucket_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket of the k-th largest, and how many lie in higher ones."""
    from_above = counts.flip(0).cumsum(0)
    place = int((from_above < k).sum())
    above = int(from_above[place - 1]) if place else 0
    return _BUCKETS - 1 - place - _BUCKETS // 2, above


def tile_sums(scores: Tensor, side: int) -> Tensor:
    """[out, in] → [ceil(out / side), ceil(in / side)], the sum over each tile.

    A tile is a tile of the matrix itself; the last ones of a row or column may be ragged.
    """
    rows, columns = scores.shape
    down, across = math.ceil(rows / side), math.ceil(columns / side)
    padded = scores.new_zeros(down * side, across * side)
    padded[:rows, :columns] = scores
    return padded.view(down, side, across, side).sum(dim=(1, 3))


def tile_entries(tiles: Tensor, shape: tuple[int, int], side: int) -> Tensor:
    """The positions of all entries of some tiles, int64, sorted.

    Args:
        tiles: int64, row-major in the grid of tiles.
        shape: (out_features, in_features) of the weight.
        side: of a tile.
    """
    across = math.ceil(shape[1] / side)
    inner = torch.arange(side, device=tiles.device)
    rows = (tiles // across * side)[:, None, None] + inner[:, None]
    columns = (tiles % across * side)[:, None, None] + inner
    rows, columns = torch.broadcast_tensors(rows, columns)
    inside = (rows < shape[0]) & (columns < shape[1])
    positions: Tensor = (rows * shape[1] + columns)[inside].sort().values
    return positions
