"""Gated MLPs that keep one tensor less for their backward pass.

Of down(act(gate) · up) autograd keeps gate, act(gate), up and their product. act(gate) is cheap to
compute again, and as large as each of the others: of SmolLM2-135M's activations, 512 tokens, that
is 90 of 690 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gossamer.base.alike import MISFITS, alike
from gossamer.training.overriding import overriding

#: Names that transformers gives the parts of such a module.
_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
#: Of the random input: as a norm gives it, and so large that whatever clamps does.
_SCALES = (1.0, 30.0)


class _Gated(torch.autograd.Function):
    """act(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: nn.Module) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        product: Tensor = act(gate) * up
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active: Tensor = ctx.act(gate)
        (grad_gate,) = torch.autograd.grad(active, gate, grad_output * up)
        return grad_gate, grad_output * active.detach(), None


def _forward(module: Any, x: Tensor) -> Tensor:
    # The layers are looked up now: those that are trained stand in the place of the module's own.
    product = _Gated.apply(module.gate_proj(x), module.up_proj(x), module.act_fn)
    y: Tensor = module.down_proj(product)
    return y


@torch.no_grad()
def gated_mlps(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that compute down(act(gate(x)) · up(x)).

    They are known by the names of their parts, and by what they answer to random input, small and
    large. One that answers with zeros alone is not known.

    Raises:
        torch.OutOfMemoryError
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for module in model.modules():
        if not all(isinstance(getattr(module, name, None), nn.Module) for name in _PARTS):
            continue
        weight = getattr(module.get_submodule("gate_proj"), "weight", None)
        if not isinstance(weight, Tensor):
            continue
        x = torch.randn(1, 3, weight.shape[-1], generator=generator)
        x = x.to(weight.device, weight.dtype)
        if all(_agrees(module, scale * x) for scale in _SCALES):
            found.append(module)
    return found


def _agrees(module: nn.Module, x: Tensor) -> bool:
    """Whether the module answers as it would recomputing, up to rounding, and not by zeros."""
    try:
        wanted = module(x)
        return alike(_forward(module, x), wanted) and bool(wanted.abs().max() > 0)
    except torch.OutOfMemoryError:
        raise
    except MISFITS:
        return False


def recomputing(mlps: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Let these modules compute act(gate) again instead of keeping it, while the context lasts."""
    return overriding(mlps, lambda module: partial(_forward, module))
