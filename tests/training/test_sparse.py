"""The sparse layer against dense autograd, and the base's bits after it."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from gossamer.base.fingerprint import fingerprint
from gossamer.store.format import seeded_positions
from gossamer.training import sparse
from gossamer.training.sparse import (
    SparseLinear,
    Support,
    TrainedLayer,
    attached,
    values_gradient,
)
from tests.tiny import ARCHS, tiny_model
from tests.training.support import linear_of

OUT, IN = 12, 20


def positions_of(density: float, out: int = OUT, columns: int = IN) -> Tensor:
    count = max(1, round(density * out * columns))
    return torch.from_numpy(seeded_positions(3, "w", out * columns, count))


def made(where: Mapping[str, Tensor]) -> dict[str, Callable[[nn.Linear], TrainedLayer]]:
    def of(positions: Tensor) -> Callable[[nn.Linear], TrainedLayer]:
        return lambda linear: SparseLinear(linear, positions, written=True)

    return {name: of(positions) for name, positions in where.items()}


def double_layer(*, written: bool, bias: bool = True, density: float = 0.1) -> SparseLinear:
    linear = linear_of(OUT, IN, bias=bias, dtype=torch.float64)
    layer = SparseLinear(linear, positions_of(density), written=written)
    with torch.no_grad():
        layer.values.copy_(torch.linspace(-1, 1, layer.values.numel(), dtype=torch.float64))
    layer.write()
    return layer


def apply_values(layer: SparseLinear, x: Tensor, values: Tensor) -> Tensor:
    """The layer as a pure function of its input and values, for `gradcheck`."""
    with torch.no_grad():
        layer.values.copy_(values)
    layer.write()
    weight = layer.linear.weight.clone()
    y: Any = sparse._SparseLinear.apply(x, values, weight, layer.linear.bias, layer)
    assert isinstance(y, Tensor)
    return y


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("written", [True, False])
def test_gradients_pass_gradcheck(
    monkeypatch: pytest.MonkeyPatch, written: bool, sampled: bool
) -> None:
    monkeypatch.setattr(sparse, "SAMPLED_BELOW", 1.1 if sampled else 0.0)
    layer = double_layer(written=written)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    values = layer.values.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: apply_values(layer, x, v), (x, values))


@pytest.mark.parametrize("sampled", [True, False])
def test_gradcheck_rejects_a_corrupted_index(
    monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    monkeypatch.setattr(sparse, "SAMPLED_BELOW", 1.1 if sampled else 0.0)
    layer = double_layer(written=True)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    values = layer.values.detach().clone().requires_grad_()
    right = layer.support
    wrong = right.positions.clone()
    wrong[-1] = (wrong[-1] + 1) % (OUT * IN)

    def corrupted(x: Tensor, values: Tensor) -> Tensor:
        layer.support = right
        with torch.no_grad():
            layer.values.copy_(values)
        layer.write()
        layer.support = Support(right.shape, wrong)
        weight = layer.linear.weight.clone()
        y: Any = sparse._SparseLinear.apply(x, values, weight, None, layer)
        assert isinstance(y, Tensor)
        return y

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(corrupted, (x, values))


@pytest.mark.parametrize("density", [1 / (OUT * IN), 0.02, 0.04, 0.06, 0.5, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("written", [True, False])
def test_values_and_gradients_equal_dense_autograd(
    density: float, bias: bool, written: bool
) -> None:
    layer = double_layer(written=written, bias=bias, density=density)
    plain = linear_of(OUT, IN, bias=bias, dtype=torch.float64).weight.detach()
    flat = plain.clone().reshape(-1)
    flat[layer.support.positions] += layer.values.detach()
    weight = flat.view(OUT, IN).requires_grad_()
    x = torch.randn(5, IN, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    g = torch.randn(5, OUT, dtype=torch.float64)
    expected = nn.functional.linear(theirs, weight, layer.linear.bias)
    expected.backward(g)
    actual = layer(ours)
    actual.backward(g)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert weight.grad is not None
    dense = weight.grad.reshape(-1)[layer.support.positions]
    torch.testing.assert_close(layer.values.grad, dense)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(layer.values.grad, dense.roll(1) + 1e-3)


def test_both_ways_to_the_gradient_agree_in_fp32() -> None:
    support = Support((48, 64), positions_of(0.05, 48, 64))
    g, x = torch.randn(200, 48), torch.randn(200, 64)
    sampled = values_gradient(g, x, support, sampled=True)
    dense = values_gradient(g, x, support, sampled=False)
    torch.testing.assert_close(sampled, dense, rtol=1e-5, atol=1e-4)


def test_no_gradient_of_a_whole_weight_is_kept() -> None:
    layer = SparseLinear(linear_of(OUT, IN), positions_of(0.1), written=True)
    layer(torch.randn(3, IN)).sum().backward()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["values"]
    assert layer.linear.weight.grad is None
    assert layer.values.grad is not None
    assert layer.values.grad.shape == layer.values.shape


def test_a_write_between_forward_and_backward_is_noticed() -> None:
    layer = SparseLinear(linear_of(OUT, IN), positions_of(0.1), written=True)
    y = layer(torch.randn(3, IN))
    layer.write()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restore_gives_every_bit_back(dtype: torch.dtype) -> None:
    linear = linear_of(OUT, IN, dtype=dtype)
    before = linear.weight.detach().clone()
    layer = SparseLinear(linear, positions_of(0.3), written=True)
    for step in range(200):
        with torch.no_grad():
            layer.values.copy_(torch.randn(layer.values.shape) * 10.0 ** (step % 7 - 4))
        layer.write()
    assert not torch.equal(linear.weight, before)
    layer.restore()
    assert torch.equal(linear.weight, before)
    # subtracting would not have done it
    layer.write()
    with torch.no_grad():
        linear.weight.view(-1)[layer.support.positions] -= layer.values.to(dtype)
    assert not torch.equal(linear.weight, before)


def test_a_16_bit_weight_that_is_not_written_keeps_small_differences() -> None:
    linear = linear_of(OUT, IN, dtype=torch.bfloat16)
    layer = SparseLinear(linear, positions_of(1.0), written=False)
    with torch.no_grad():
        layer.values.fill_(1e-4)
    x = torch.ones(1, IN, dtype=torch.bfloat16)
    moved = layer(x).float() - linear(x).float()
    assert torch.equal(layer.linear.weight, linear_of(OUT, IN, dtype=torch.bfloat16).weight)
    written = SparseLinear(
        linear_of(OUT, IN, dtype=torch.bfloat16), positions_of(1.0), written=True
    )
    with torch.no_grad():
        written.values.fill_(1e-4)
    written.write()
    absorbed = (written.linear.weight == linear.weight).float().mean()
    assert absorbed > 0.5  # what writing into 16 bits would have lost
    assert layer.support.dense(layer.values, torch.bfloat16).ne(0).all()
    assert moved.shape == (1, OUT)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_is_itself_again_after_the_layers(arch: str) -> None:
    model = tiny_model(arch)
    before, layers_before = fingerprint(model), dict(model.named_modules())
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "attn" in n)
    where = {f"{name}.weight": torch.arange(0, 500, 5)}
    ids = torch.arange(20).view(1, -1)
    plain = model(input_ids=ids).logits
    with attached(model, made(where)) as layers:
        torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=0, atol=0)
        layer = layers[f"{name}.weight"]
        (values,) = layer.trained
        with torch.no_grad():
            values.fill_(0.5)
        layer.write()
        assert (model(input_ids=ids).logits - plain).abs().max() > 1e-3
        assert fingerprint_of_weight(layer) != before
    assert fingerprint(model) == before
    assert dict(model.named_modules()) == layers_before
    assert torch.equal(model(input_ids=ids).logits, plain)


def fingerprint_of_weight(layer: TrainedLayer) -> str:
    return hashlib.sha256(layer.linear.weight.detach().numpy().tobytes()).hexdigest()


def test_layers_are_restored_when_the_run_fails() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    where = {"model.layers.0.self_attn.o_proj.weight": torch.arange(9)}

    def fail() -> None:
        with attached(model, made(where)) as layers:
            for layer in layers.values():
                (values,) = layer.trained
                with torch.no_grad():
                    values.fill_(1.0)
                layer.write()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert fingerprint(model) == before


def test_only_linear_layers_can_be_attached() -> None:
    model = tiny_model("llama")
    where = {"model.norm.weight": torch.arange(3)}
    layers = attached(model, made(where))
    with pytest.raises(TypeError, match="not the weight of a linear layer"):
        layers.__enter__()
    assert fingerprint(model) == fingerprint(tiny_model("llama"))


def test_the_sweep_behind_the_constant_is_written_down() -> None:
    text = Path(__file__).parents[2].joinpath("docs/decisions/sampled-gradient.md").read_text()
    assert f"SAMPLED_BELOW = {sparse.SAMPLED_BELOW:g}" in text
