"""Linear layers with trained values at a few positions of a frozen weight.

The values are the only trainable tensors, so the optimiser's state is O(nnz) and no gradient of a
whole weight outlives one layer's backward pass. The base weight is never a leaf of the graph; what
is written into it is undone by overwriting with saved bits, never by subtracting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: Below this density the gradient of the values is a sampled product; above it, the dense product
#: of the layer with a gather is faster. Swept by `benchmarks/sampled_gradient.py`; the table is in
#: docs/decisions/sampled-gradient.md.
SAMPLED_BELOW = 0.07


@dataclass(frozen=True, eq=False)
class Entries:
    """Some entries of one weight.

    Attributes:
        positions: int64 [n], row-major, strictly increasing.
        values: [n], float32 or wider.
    """

    positions: Tensor
    values: Tensor


class Support:
    """The positions of one weight, in the forms that the products need.

    Attributes:
        shape: (out_features, in_features) of the weight.
        positions: int64 [nnz], row-major, strictly increasing, on the weight's device.
    """

    def __init__(self, shape: tuple[int, int], positions: Tensor) -> None:
        self.shape = shape
        self.positions = positions
        self.density = positions.numel() / (shape[0] * shape[1])
        rows, self._columns = positions // shape[1], positions % shape[1]
        counts = torch.bincount(rows, minlength=shape[0])
        self._row_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def pattern(self, dtype: torch.dtype) -> Tensor:
        """A CSR tensor of zeros with this support."""
        zeros = torch.zeros(self.positions.numel(), dtype=dtype, device=self.positions.device)
        with warnings.catch_warnings():
            # torch says once that its CSR layout is in beta; only its shape is used here
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_csr_tensor(
                self._row_starts, self._columns, zeros, self.shape, check_invariants=False
            )

    def dense(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """`values` [nnz] in a dense tensor of `shape`, zero elsewhere."""
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=dtype, device=values.device)
        flat[self.positions] = values.to(dtype)
        return flat.view(self.shape)


def values_gradient(
    grad_output: Tensor, inputs: Tensor, support: Support, *, sampled: bool
) -> Tensor:
    """The gradient of the values: (grad_outputᵀ · inputs) at the support.

    Args:
        grad_output: [tokens, out_features].
        inputs: [tokens, in_features], of the same dtype.
        support: of the weight.
        sampled: compute the wanted entries only, instead of all and gathering.

    Returns:
        [nnz], in the dtype of the arguments.
    """
    if sampled:
        pattern = support.pattern(inputs.dtype)
        product = torch.sparse.sampled_addmm(pattern, grad_output.t(), inputs, beta=0.0)
        values: Tensor = product.values()
        return values
    return (grad_output.t() @ inputs).reshape(-1)[support.positions]


class _SparseLinear(torch.autograd.Function):
    """y = x Wᵀ + b, where W holds the values already, or y = x Wᵀ + x Δᵀ + b, where it does not.

    The gradient of the values is the same in both cases, (gᵀ x) at the support.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: SparseLinear,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        if not layer.written:
            y = y + F.linear(x.to(y.dtype), layer.difference(values, y.dtype))
        # Autograd notes their versions: a write between forward and backward raises.
        ctx.save_for_backward(x, values, weight)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, values, weight = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ weight.to(grad_output.dtype)
            if not ctx.layer.written:
                grad_x = grad_x + grad_output @ ctx.layer.difference(values, grad_output.dtype)
            grad_x = grad_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            # CSR kernels of 16-bit types are missing on some devices, and a sum over thousands of
            # tokens wants the wider type; a dense product accumulates in fp32 by itself.
            support = ctx.layer.support
            sampled = support.density < SAMPLED_BELOW
            dtype = values.dtype if sampled else grad_output.dtype
            g = grad_output.reshape(-1, grad_output.shape[-1]).to(dtype)
            inputs = x.reshape(-1, x.shape[-1]).to(dtype)
            grad_values = values_gradient(g, inputs, support, sampled=sampled)
            grad_values = grad_values.to(values.dtype)
        return grad_x, grad_values, None, None, None


class SparseLinear(nn.Module):
    """Stands in for an `nn.Linear` while a few of its entries are trained.

    With `written`, the layer's own weight holds W₀ + values after each `write`, and a forward pass
    costs no more than the plain layer's; rounding W₀ + values to 16 bits would swallow a third of
    small differences, so in 16-bit arithmetic the difference is a term of its own instead, and the
    weight is never written.

    Args:
        linear: the layer.
        positions: int64 [nnz], row-major, strictly increasing: what is trained.
        written: see above.
        start: [nnz], what the values begin with; zeros when not given.
        fixed: other entries, which the layer computes with and which are not trained.

    Attributes:
        values: float32 [nnz], the only parameter.
    """

    def __init__(
        self,
        linear: nn.Linear,
        positions: Tensor,
        *,
        written: bool,
        start: Tensor | None = None,
        fixed: Entries | None = None,
    ) -> None:
        super().__init__()
        weight = linear.weight
        device = weight.device
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        where = positions.to(device)
        self.linear = linear
        self.support = Support((linear.out_features, linear.in_features), where)
        self.written = written
        begin = torch.zeros(where.numel()) if start is None else start
        self.values = nn.Parameter(begin.to(device, dtype, copy=True))
        self._originals = self._flat()[where].clone()
        self._fixed: Entries | None = None
        if fixed is not None:
            self._fixed = Entries(fixed.positions.to(device), fixed.values.to(device, dtype))
            self._fixed_originals = self._flat()[self._fixed.positions].clone()
        self.write()

    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] → […, out_features]."""
        linear = self.linear
        y: Tensor = _SparseLinear.apply(x, self.values, linear.weight, linear.bias, self)
        return y

    def difference(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """What is not in the weight, dense: `values` and the fixed entries."""
        dense = self.support.dense(values, dtype)
        if self._fixed is not None:
            dense.view(-1)[self._fixed.positions] = self._fixed.values.to(dtype)
        return dense

    @property
    def weight(self) -> Tensor:
        """The layer's weight; some attention code looks at its dtype."""
        return self.linear.weight

    @torch.no_grad()
    def write(self) -> None:
        """Bring the weight up to date with the values; to be called whenever these have changed."""
        if self.written:
            self._put(self.support.positions, self._originals, self.values)
            if self._fixed is not None:
                self._put(self._fixed.positions, self._fixed_originals, self._fixed.values)

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        """The values, if there are any."""
        return (self.values,) if self.values.numel() else ()

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"values": self.values}

    @torch.no_grad()
    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """What a checkpoint kept; `write` follows."""
        self.values.copy_(state["values"])

    def _put(self, positions: Tensor, originals: Tensor, values: Tensor) -> None:
        changed = originals.to(values.dtype) + values
        self._flat()[positions] = changed.to(originals.dtype)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the weight its original bits back."""
        if self.written:
            self._flat()[self.support.positions] = self._originals
            if self._fixed is not None:
                self._flat()[self._fixed.positions] = self._fixed_originals

    def _flat(self) -> Tensor:
        # view, not reshape: a copy would take the writes in the weight's place
        return self.linear.weight.detach().view(-1)


class TrainedLayer(Protocol):
    """What stands in for a linear layer while it is trained: an `nn.Module`."""

    linear: nn.Linear

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        """What the optimiser moves; may be nothing."""

    def write(self) -> None:
        """What is trained has changed."""

    def restore(self) -> None:
        """Give the layer's weight its original bits back."""

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """What a checkpoint kept; `write` follows."""


@contextmanager
def attached(
    model: nn.Module, made: Mapping[str, Callable[[nn.Linear], TrainedLayer]]
) -> Iterator[dict[str, TrainedLayer]]:
    """Put a layer in the place of each named weight's layer, and the layers back after.

    Args:
        model: the base; changed in place for as long as the context lasts, however it ends.
        made: base weight name → what stands in for its layer.

    Yields:
        Base weight name → the layer in its place.
    """
    layers: dict[str, TrainedLayer] = {}
    places: dict[str, tuple[nn.Module, str]] = {}
    try:
        for name, make in made.items():
            parent_name, _, child = name.removesuffix(".weight").rpartition(".")
            parent = model.get_submodule(parent_name)
            linear = parent.get_submodule(child)
            if not isinstance(linear, nn.Linear):
                raise TypeError(f"{name} is not the weight of a linear layer")
            layers[name] = make(linear)
            places[name] = (parent, child)
            setattr(parent, child, layers[name])
        yield layers
    finally:
        for name, (parent, child) in places.items():
            layers[name].restore()
            setattr(parent, child, layers[name].linear)
