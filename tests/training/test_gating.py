"""Gated MLPs that compute their activation again: the same numbers, less memory, nothing left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gossamer.base.load import load_directory
from gossamer.training.gating import gated_mlps, recomputing
from gossamer.training.sparse import SparseLinear, attached


class _Mlp(nn.Module):
    def __init__(self, *, twisted: bool = False, clamp: float | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 10), nn.Linear(6, 10)
        self.down_proj = nn.Linear(10, 6)
        self.act_fn = nn.GELU()
        self.twisted = twisted
        self.clamp = clamp

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        if self.clamp is not None:
            gate = gate.clamp(max=self.clamp)
        act = self.act_fn(gate) * self.up_proj(x)
        y: Tensor = self.down_proj(act + 1e-3 if self.twisted else act)
        return y


def _kept(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What it gives, and the bytes that its backward pass keeps."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(kept.values())


def test_the_same_gradients_from_less_memory() -> None:
    torch.manual_seed(0)
    mlp = _Mlp().double()
    x = torch.randn(4, 7, 6, dtype=torch.float64, requires_grad=True)
    wanted, before = _kept(lambda: mlp(x))
    gradients = torch.autograd.grad(wanted.sin().sum(), (x, *mlp.parameters()))
    with recomputing([mlp]):
        found, after = _kept(lambda: mlp(x))
    ours = torch.autograd.grad(found.sin().sum(), (x, *mlp.parameters()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(ours, gradients, rtol=1e-12, atol=1e-14)
    assert before - after == 4 * 7 * 10 * 8
    assert "forward" not in vars(mlp)


def test_only_what_computes_this_is_taken() -> None:
    model = nn.ModuleList([_Mlp(), _Mlp(twisted=True), nn.Linear(6, 6), _Mlp()])
    state = torch.get_rng_state()
    assert gated_mlps(model) == [model[0], model[3]]
    assert torch.equal(torch.get_rng_state(), state)


def test_one_that_clamps_large_activations_is_not_taken() -> None:
    torch.manual_seed(0)
    clamping, large = _Mlp(clamp=4.0), _Mlp(clamp=1e6)
    x = torch.randn(64, 6)
    assert clamping.gate_proj(x).max() < 4, "what a norm gives is too small to show it"
    assert gated_mlps(nn.ModuleList([clamping, large])) == [large]


def test_one_that_answers_with_zeros_is_not_taken() -> None:
    """Whatever it computes, zeros agree with it."""
    mlp = _Mlp(twisted=True)
    for parameter in mlp.down_proj.parameters():
        nn.init.zeros_(parameter)
    assert gated_mlps(mlp) == []


def test_no_memory_is_not_taken_for_another_kind_of_module() -> None:
    class Full(_Mlp):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError(f"no room for {x.shape}")

    class Other(_Mlp):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(f"it wants more than {x.shape}")

    assert gated_mlps(Other()) == []
    with pytest.raises(torch.OutOfMemoryError):
        gated_mlps(Full())


@pytest.mark.parametrize(("arch", "taken"), [("llama", True), ("gemma2", True), ("phi3", False)])
def test_transformers_own(tiny_dir: Callable[..., Path], arch: str, taken: bool) -> None:
    model = load_directory(tiny_dir(arch), torch.float32)
    found = gated_mlps(model)
    assert len(found) == (model.config.num_hidden_layers if taken else 0)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        wanted = model(ids).logits
        with recomputing(found):
            assert torch.equal(model(ids).logits, wanted)


def test_layers_that_are_trained_are_the_ones_that_run(tiny_dir: Callable[..., Path]) -> None:
    model = load_directory(tiny_dir("llama"), torch.float32)
    name = "model.layers.0.mlp.gate_proj.weight"
    ids = torch.arange(6).view(1, 6)
    where = torch.tensor([3, 8])
    found = gated_mlps(model)
    make = {name: lambda linear: SparseLinear(linear, where, written=True)}
    gradients = []
    for mlps in ([], found):
        with attached(model, make) as layers, recomputing(mlps):
            model(ids).logits.square().sum().backward()
            gradients.append(layers[name].trained[0].grad)
    assert gradients[0] is not None
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(gradients[1], gradients[0])
