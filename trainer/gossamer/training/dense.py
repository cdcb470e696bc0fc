"""Linear layers whose whole weight is trained, as a difference to the frozen one.

LoTA's calibration, MCS's first epoch and the full baseline train this way. The base weight is not
written: what is trained is Ŵ [out, in], zero at first, and the layer computes with W + S + Ŵ, or
with W + S + Ŵ ∘ M while a mask M is set; S are the entries that the run begins with, if any. Ŵ is
the change itself, not a subtraction of two weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gossamer.training.sparse import Entries


class _DenseLinear(torch.autograd.Function):
    """y = x (W + S + Ŵ ∘ M)ᵀ + b. The sum lives for one layer at a time, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, layer: DenseLinear
    ) -> Tensor:
        ctx.save_for_backward(x, values, weight, layer.mask)
        ctx.layer = layer
        changed = layer.difference()
        if layer.summed:
            return F.linear(x, changed.add_(weight), bias)
        y = F.linear(x, weight, bias)
        return y + F.linear(x.to(y.dtype), changed.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, values, weight, mask = ctx.saved_tensors
        grad_x = grad = None
        if ctx.needs_input_grad[0]:
            changed = ctx.layer.difference()
            if ctx.layer.summed:
                grad_x = grad_output @ changed.add_(weight)
            else:
                grad_x = grad_output @ weight.to(grad_output.dtype)
                grad_x = grad_x + grad_output @ changed.to(grad_output.dtype)
            grad_x = grad_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            g = grad_output.reshape(-1, grad_output.shape[-1])
            grad = (g.t() @ x.reshape(-1, x.shape[-1]).to(g.dtype)).to(values.dtype)
            if mask is not None:
                grad *= mask
        return grad_x, grad, None, None, None


class DenseLinear(nn.Module):
    """Stands in for an `nn.Linear` while all of its weight is trained.

    Args:
        linear: the layer; not changed.
        summed: compute with the sum of the weight and its changes, one product. In 16 bits it would
            round small changes away: there they are a product of their own, as in `SparseLinear`.
        start: S, entries that the layer computes with from the beginning on; constant.
        allowed: bool [out, in]; Ŵ stays 0 where it is False.

    Attributes:
        values: Ŵ, float32 [out, in].
        mask: M, bool [out, in], or None for all; may be set between two steps.
        anchor: Ŵ at an earlier step, for scores that compare with it.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        summed: bool,
        start: Entries | None = None,
        allowed: Tensor | None = None,
    ) -> None:
        super().__init__()
        weight = linear.weight
        device = weight.device
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.linear = linear
        self.summed = summed
        self.values = nn.Parameter(torch.zeros(weight.shape, dtype=dtype, device=device))
        self._start: Entries | None = None
        if start is not None:
            self._start = Entries(start.positions.to(device), start.values.to(device, dtype))
        self.mask: Tensor | None = None
        self.anchor: Tensor | None = None
        if allowed is not None:
            kept = allowed.to(device)
            self.values.register_hook(lambda grad: grad * kept)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] → […, out_features]."""
        linear = self.linear
        y: Tensor = _DenseLinear.apply(x, self.values, linear.weight, linear.bias, self)
        return y

    def difference(self) -> Tensor:
        """S + Ŵ ∘ M: what the layer computes with beyond its weight, a new tensor [out, in]."""
        values = self.values.detach()
        dense = values.clone() if self.mask is None else values * self.mask
        if self._start is not None:
            dense.view(-1)[self._start.positions] += self._start.values
        return dense

    @property
    def weight(self) -> Tensor:
        """The layer's weight; some attention code looks at its dtype."""
        return self.linear.weight

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        """Ŵ."""
        return (self.values,)

    def write(self) -> None:
        """Nothing to do: the weight does not hold the values."""

    def restore(self) -> None:
        """Nothing to do."""

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        kept = {"values": self.values, "mask": self.mask, "anchor": self.anchor}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}

    @torch.no_grad()
    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """What a checkpoint kept."""
        device = self.values.device
        self.values.copy_(state["values"])
        self.mask = state["mask"].to(device) if "mask" in state else None
        self.anchor = state["anchor"].to(device) if "anchor" in state else None
