"""A layer's parts written with few kernels, and all layers of a base as one module.

Which module of a model one of these replaces is for `shortcuts` to find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from gossamer.engine.attention import AttentionStep, attend_rows
from gossamer.engine.patched import PatchedLinear, Product
from gossamer.kernels import (
    Backend,
    fused_add_rms_norm,
    rms_norm,
    rotate_and_write,
    silu_and_mul,
)


class RMSNorm(nn.Module):
    """A norm as one kernel."""

    def __init__(self, weight: Tensor, eps: float, backend: Backend) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps
        self._backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] → the same shape."""
        return self.rows(x.reshape(-1, x.shape[-1])).view(x.shape)

    def rows(self, x: Tensor) -> Tensor:
        """x [rows, width] → the same shape."""
        return rms_norm(x, self.weight, self.eps, self._backend)

    def after(self, residual: Tensor, x: Product) -> Tensor:
        """The norm of residual + x, [rows, width] each; the sum is left in `residual`."""
        return fused_add_rms_norm(residual, x.y, self.weight, self.eps, self._backend, x.terms)


class GatedMLP(nn.Module):
    """down(silu(gate x) · up x), gate and up in one product."""

    def __init__(self, gate_up: PatchedLinear, down: PatchedLinear, backend: Backend) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self._backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] → the same shape."""
        return self.rows(x.reshape(-1, x.shape[-1])).whole().view(x.shape)

    def rows(self, x: Tensor) -> Product:
        """x [rows, hidden] → the same shape."""
        gate_up = self.gate_up.product(x)
        return self.down.product(silu_and_mul(gate_up.y, self._backend, gate_up.terms))


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads, and the width of one."""

    query: int
    key_value: int
    dim: int


class RotaryAttention(nn.Module):
    """q, k and v in one product, rotated and stored by one kernel; attention; o."""

    def __init__(
        self, qkv: PatchedLinear, o: PatchedLinear, layer: int, heads: Heads,
        constants: dict[str, Any], backend: Backend,
    ) -> None:  # fmt: skip
        super().__init__()
        self.qkv = qkv
        self.o = o
        self.layer = layer
        self.heads = heads
        self.constants = constants
        self._backend = backend

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *,
        step: AttentionStep,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[1, rows, hidden] → ([1, rows, hidden], None); what else is passed changes nothing."""
        return self.rows(hidden_states[0], position_embeddings, step).whole()[None], None

    def rows(self, x: Tensor, angles: tuple[Tensor, Tensor], step: AttentionStep) -> Product:
        """x [rows, hidden] → the same shape; angles: cos and sin, [1, rows, dim]."""
        qkv, terms = self.qkv.product(x)
        cos, sin = angles
        k_pages, v_pages = step.kv[self.layer]
        rotate_and_write(qkv, cos[0], sin[0], k_pages, v_pages, step.slots, self._backend, terms)
        rows = qkv.shape[0]
        query = qkv.view(rows, -1, self.heads.dim)[:, : self.heads.query]
        out = attend_rows(query, self.layer, step, **self.constants)
        return self.o.product(out.view(rows, -1))


class PreNormLayer(nn.Module):
    """x + attention(norm(x)), and on that x + mlp(norm(x))."""

    def __init__(
        self, norm: RMSNorm, attention: RotaryAttention, second_norm: RMSNorm, mlp: GatedMLP
    ) -> None:
        super().__init__()
        self.norm = norm
        self.attention = attention
        self.second_norm = second_norm
        self.mlp = mlp

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        step: AttentionStep,
        **_: Any,
    ) -> Tensor:
        """[1, rows, hidden] → the same shape; what else is passed changes nothing."""
        residual = hidden_states[0].clone()
        attended = self.attention.rows(self.norm.rows(residual), position_embeddings, step)
        added = self.mlp.rows(self.second_norm.after(residual, attended))
        return residual.add_(added.whole())[None]


class Replays(Protocol):
    """Runs a stack's steps from programs (see `replays`)."""

    def run(
        self, stack: LayerStack, x: Tensor, angles: tuple[Tensor, Tensor], step: AttentionStep
    ) -> Tensor | None:
        """What `stack.forward` gives for x [rows, hidden]; None: this step has no program."""


class LayerStack(nn.Module):
    """All layers of a base, one after the other.

    Attributes:
        replays: runs the steps that it can; None: every step is launched kernel by kernel.
    """

    def __init__(self, layers: Sequence[PreNormLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._each = tuple(layers)
        self.replays: Replays | None = None

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        step: AttentionStep,
        **_: Any,
    ) -> Tensor:
        """[1, rows, hidden] → the same shape; what else is passed changes nothing."""
        x = hidden_states[0]
        if self.replays is not None:
            out = self.replays.run(self, x, position_embeddings, step)
            if out is not None:
                return out[None]
        residual = x.clone()
        return residual.add_(self.rows(residual, position_embeddings, step))[None]

    def rows(self, residual: Tensor, angles: tuple[Tensor, Tensor], step: AttentionStep) -> Tensor:
        """residual [rows, hidden] → what is still to be added to it, after all layers.

        The residual is written; angles: cos and sin, [1, rows, dim].
        """
        normed = self._each[0].norm.rows(residual)
        for layer, following in zip(self._each, (*self._each[1:], None), strict=True):
            attended = layer.attention.rows(normed, angles, step)
            added = layer.mlp.rows(layer.second_norm.after(residual, attended))
            if following is not None:
                normed = following.norm.after(residual, added)
        return added.whole()
