"""Linear layers with PEFT's LoRA beside a frozen weight: the low-rank baseline.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: Low-Rank Adaptation of Large Language
Models" (2021). The layer is PEFT's own, with its initialisation, its scaling and its forward pass;
ours is what the loop asks of a trained layer. Nothing but the method `lora` imports this module,
and nothing else imports PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from gossamer.training.sparse import Entries, SparseLinear

_NAME = "default"


class LowRankLinear(nn.Module):
    """Stands in for an `nn.Linear` while alpha / rank · B A is trained beside its weight.

    Layers that are made one after the other with one generator, in the order in which the model has
    them, begin as those of `get_peft_model` after `torch.manual_seed` of its seed: A uniform, B 0.

    Args:
        linear: the layer.
        rank: of the product; may be larger than the sides of the weight.
        alpha: the product is scaled by alpha / rank.
        generator: of the first A, on the CPU; advanced.
        start: S, entries that the layer computes with from the beginning on; constant.
        written: whether the weight holds S meanwhile; see `SparseLinear`.

    Attributes:
        peft: PEFT's layer.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        start: Entries | None = None,
        written: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.peft = _injected(linear, rank, alpha, generator)
        # As get_peft_model does: of a base in 16 bits only the base stays in 16 bits.
        wide = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        self._a: nn.Parameter = self.peft.lora_A[_NAME].to(wide).weight
        self._b: nn.Parameter = self.peft.lora_B[_NAME].to(wide).weight
        self._held: SparseLinear | None = None
        if start is not None:
            none = torch.empty(0, dtype=torch.int64)
            self._held = SparseLinear(linear, none, written=written, fixed=start)
            self.peft.base_layer = self._held

    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] → […, out_features]."""
        y: Tensor = self.peft(x)
        return y

    @property
    def weight(self) -> Tensor:
        """The layer's weight; some attention code looks at its dtype."""
        return self.linear.weight

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        """A [rank, in_features] and B [out_features, rank], float32."""
        return (self._a, self._b)

    @torch.no_grad()
    def difference(self) -> Tensor:
        """S + alpha / rank · B A: what the layer computes with beyond its weight, [out, in]."""
        dense: Tensor = self.peft.get_delta_weight(_NAME)
        if self._held is not None:
            dense = dense + self._held.difference(self._held.values, dense.dtype)
        return dense

    def write(self) -> None:
        """Nothing to do: the weight does not hold the product."""

    def restore(self) -> None:
        """Give the weight its original bits back."""
        if self._held is not None:
            self._held.restore()

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"a": self._a, "b": self._b}

    @torch.no_grad()
    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """What a checkpoint kept."""
        self._a.copy_(state["a"])
        self._b.copy_(state["b"])


def _injected(linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> Any:
    """PEFT's layer around a linear one, as PEFT puts it there."""
    box = nn.ModuleDict({"linear": linear})
    settings: Any = {"r": rank, "lora_alpha": alpha}  # PEFT's type has int; it divides
    config = LoraConfig(**settings, target_modules=["linear"])
    # PEFT draws from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        inject_adapter_in_model(config, box, _NAME)
        generator.set_state(torch.get_rng_state())
    return box["linear"]
