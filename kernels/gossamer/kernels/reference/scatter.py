"""What fusing means, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.kernels.delta import PackedDelta, entries


def fuse_into(weight: Tensor, deltas: Sequence[PackedDelta], weights: Tensor) -> tuple[Tensor, ...]:
    """See `gossamer.kernels.scatter.fuse_into`; the weight comes as (out, in). Any float dtype.

    Returns:
        (touched: bool (out, in), originals: the touched entries, row-major).
    """
    total = weight.float()
    total = total.clone() if total.data_ptr() == weight.data_ptr() else total
    touched = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    for delta, factors in zip(deltas, weights.tolist(), strict=True):
        for projection, row, column, value in entries(delta):
            factor = factors[projection if len(factors) > 1 else 0]
            if factor != 0:
                total[row, column] += value * factor
                touched[row, column] = True
    originals = weight[touched]
    try:
        weight[touched] = total[touched].to(weight.dtype)
    except BaseException:
        weight[touched] = originals
        raise
    return touched, originals


def restore(weight: Tensor, _deltas: Sequence[PackedDelta], originals: tuple[Tensor, ...]) -> None:
    """See `gossamer.kernels.scatter.restore`."""
    touched, values = originals
    weight[touched] = values
