"""The base's Linear layers, packed into products and able to add each row's sparse delta.

`patch` rebuilds a transformers model in place: q,k,v and gate,up become one product each
(measured: 107 → 137 tokens/s for SmolLM2-135M on two cores). The model's own forward stays as it
is: each original module hands out its slice of the product, until a shorter module takes the place
of its parent (`shortcuts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.base.patch_map import PatchedWeight, PatchMap, stacked
from gossamer.kernels import BoundDeltas, Branch, Terms, WorkPlan, apply, compute_terms, linear
from gossamer.kernels.backends import Backend


@dataclass
class StepDeltas:
    """What the patched weights add in the present step; the runner sets it before each forward.

    Attributes:
        plan: which rows use which slots; None when no row of the step has a mix.
        weights: float32 [rows of the step, most members, 1], zero beyond a row's members.
        bound: patched weight name → the residents' deltas on it, by slot. Weights that no
            active resident changes are absent.
        version: another number whenever `bound` is another.
        sides: of the tiles among the bound deltas; on a device only.
    """

    plan: WorkPlan | None = None
    weights: Tensor | None = None
    bound: dict[str, BoundDeltas] = field(default_factory=dict)
    version: int = 0
    sides: tuple[int, ...] = ()

    def forget(self) -> None:
        """The step has no deltas."""
        self.plan, self.weights, self.bound, self.sides = None, None, {}, ()

    def on(self, device: torch.device) -> StepDeltas:
        """The same with plan and weights on a device."""
        if self.plan is None or self.weights is None or device.type == "cpu":
            return self
        weights = self.weights.to(device, non_blocking=True)
        return replace(self, plan=self.plan.to(device), weights=weights)

    @contextmanager
    def replaced(self, other: StepDeltas) -> Iterator[None]:
        """Stand for another's plan, weights and bound deltas meanwhile."""
        before = self.plan, self.weights, self.bound, self.sides
        self.plan, self.weights = other.plan, other.weights
        self.bound, self.sides = other.bound, other.sides
        try:
            yield
        finally:
            self.plan, self.weights, self.bound, self.sides = before


class BaseLinear(nn.Module):
    """y = x Wᵀ + b by the base's own products (`gossamer.kernels.linear`).

    Attributes:
        weight: (out, in), or (in, out) if `transposed`.
    """

    def __init__(
        self, weight: nn.Parameter, bias: Tensor | None, backend: Backend, transposed: bool = False
    ) -> None:
        super().__init__()
        self.weight = weight
        self.transposed = transposed
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]; all leading dimensions together are the rows of the step."""
        y = self.rows(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    def rows(self, x: Tensor) -> Tensor:
        """x [rows, in] → [rows, out]."""
        return linear(x, self.weight, self.transposed, self._backend, self.bias)


class Product(NamedTuple):
    """A product of the step's rows, and what its reader must add to it.

    Attributes:
        y: [rows, out].
        terms: of the rows' deltas, where they are computed beside the product.
    """

    y: Tensor
    terms: Terms | None

    def whole(self) -> Tensor:
        """y with its terms, in place."""
        if self.terms is not None:
            self.terms.add_to(self.y)
        return self.y


class PatchedLinear(BaseLinear):
    """A product to which each row's deltas are added.

    On a CPU the weight is stored once, contiguous, as (in, out); see the decision record on its
    layout.

    Args:
        branch: where the deltas' terms are computed on a device.
    """

    def __init__(
        self, patched: PatchedWeight, weight: Tensor, bias: Tensor | None, deltas: StepDeltas,
        backend: Backend, branch: Branch,
    ) -> None:  # fmt: skip
        transposed = weight.device.type == "cpu"
        stored = (weight.t() if transposed else weight).contiguous()
        super().__init__(nn.Parameter(stored, requires_grad=False), bias, backend, transposed)
        self.name = patched.name
        self.shape = (weight.shape[0], weight.shape[1])
        self.projections = len(patched.rows)
        self._deltas = deltas
        self._branch = branch

    def rows(self, x: Tensor) -> Tensor:
        """x [rows of the step, in] → [rows, out]."""
        return self.product(x).whole()

    def product(self, x: Tensor) -> Product:
        """x [rows of the step, in] → the product, and terms that its reader adds."""
        deltas = self._deltas
        bound = deltas.bound.get(self.name) if deltas.plan is not None else None
        if bound is None or deltas.plan is None:
            return Product(super().rows(x), None)
        weights = cast(Tensor, deltas.weights)
        if self._backend != "triton":
            y = super().rows(x)
            apply(y, x, bound, deltas.plan, weights, backend=self._backend)
            return Product(y, None)
        with self._branch.beside():
            terms = compute_terms(x, bound, deltas.plan, weights)
        y = super().rows(x)
        self._branch.join()
        return Product(y, terms)


class Packed:
    """One product whose slices are handed out to the modules that it replaced."""

    def __init__(self, linear: PatchedLinear, rows: tuple[int, ...]) -> None:
        self.linear = linear
        self.rows = rows
        self._input: Tensor | None = None
        self._parts: list[Tensor] = []

    def part(self, index: int, x: Tensor) -> Tensor:
        """Slice `index` of the product of x; computed once for all modules called on the same x."""
        if index == 0 or self._input is not x:
            self._parts = list(self.linear(x).split(self.rows, dim=-1))
            self._input = x
        part = self._parts[index]
        if index == len(self.rows) - 1:
            self._input, self._parts = None, []
        return part


class Slice(nn.Module):
    """Stands where q_proj, k_proj, … stood."""

    def __init__(self, packed: Packed, index: int) -> None:
        super().__init__()
        self.packed = packed
        self.index = index
        if index == 0:
            self.product = packed.linear  # registered once, so that the module tree owns it

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., rows of this slice]."""
        return self.packed.part(self.index, x)


def patch(
    model: PreTrainedModel, patch_map: PatchMap, deltas: StepDeltas, backend: Backend
) -> dict[str, PatchedLinear]:
    """Rebuild `model` in place; returns the patched weights by name."""
    products: dict[str, PatchedLinear] = {}
    branch = Branch(model.device)
    for patched in patch_map.weights.values():
        weight, bias = stacked(model, patched)
        linear = PatchedLinear(patched, weight, bias, deltas, backend, branch)
        products[patched.name] = linear
        if len(patched.modules) == 1:
            model.set_submodule(patched.modules[0], linear)
            continue
        packed = Packed(linear, patched.rows)
        for index, module in enumerate(patched.modules):
            model.set_submodule(module, Slice(packed, index))
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        model.set_output_embeddings(BaseLinear(cast(nn.Parameter, head.weight), head.bias, backend))
    # What was read from a file is mapped from it, at any alignment; the rest is copied already.
    # The output head's product reads its weight in whole vectors every step.
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    return products
