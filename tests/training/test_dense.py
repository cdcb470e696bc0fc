"""The dense layer against plain autograd, and what 16 bits do not lose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from gossamer.training.dense import DenseLinear
from gossamer.training.sparse import Entries
from tests.training.support import linear_of

OUT, IN = 6, 9
START = Entries(torch.tensor([0, 7, 53]), torch.tensor([0.5, -1.0, 2.0]))


def layer_of(
    *, summed: bool, masked: bool = False, start: Entries | None = None,
    dtype: torch.dtype = torch.float64,
) -> DenseLinear:  # fmt: skip
    layer = DenseLinear(linear_of(OUT, IN, bias=True, dtype=dtype), summed=summed, start=start)
    with torch.no_grad():
        layer.values.copy_(torch.linspace(-1, 1, OUT * IN).view(OUT, IN))
    if masked:
        layer.mask = torch.arange(OUT * IN).view(OUT, IN) % 3 > 0
    return layer


def expected_weight(layer: DenseLinear, values: Tensor, start: Entries | None) -> Tensor:
    changed = values if layer.mask is None else values * layer.mask
    added = torch.zeros(OUT * IN, dtype=values.dtype)
    if start is not None:
        added[start.positions] = start.values.to(values.dtype)
    return layer.linear.weight + changed + added.view(OUT, IN)


@pytest.mark.parametrize("start", [None, START], ids=["base", "start"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_values_and_gradients_equal_autograd(
    summed: bool, masked: bool, start: Entries | None
) -> None:
    layer = layer_of(summed=summed, masked=masked, start=start)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    values = layer.values.detach().clone().requires_grad_()
    g = torch.randn(2, 3, OUT, dtype=torch.float64)
    expected = F.linear(theirs, expected_weight(layer, values, start), layer.linear.bias)
    expected.backward(g)
    actual = layer(ours)
    actual.backward(g)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(layer.values.grad, values.grad)
    layer.mask = torch.zeros(OUT, IN, dtype=torch.bool)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(layer(x), expected)


def test_gradcheck_passes_and_rejects_another_weight() -> None:
    layer = layer_of(summed=True, masked=True)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))

    mask = layer.mask

    def corrupted(x: Tensor) -> Tensor:
        layer.mask = mask
        y: Tensor = layer(x)
        layer.mask = None  # between forward and backward
        return y

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(corrupted, (x,))


def test_the_weight_is_never_written_and_the_change_is_exact() -> None:
    layer = layer_of(summed=True, start=START, dtype=torch.float32)
    before, version = layer.linear.weight.clone(), layer.linear.weight._version
    layer(torch.randn(3, IN)).sum().backward()
    assert torch.equal(layer.linear.weight, before)
    assert layer.linear.weight._version == version
    assert layer.linear.weight.grad is None
    difference = layer.difference() - layer.values
    assert difference.reshape(-1)[START.positions].tolist() == START.values.tolist()
    assert int(difference.count_nonzero()) == 3


def test_what_is_not_allowed_stays_zero_under_every_optimiser() -> None:
    allowed = torch.arange(OUT * IN).view(OUT, IN) % 2 > 0
    linear = linear_of(OUT, IN)
    for make in (torch.optim.AdamW, torch.optim.RMSprop):
        layer = DenseLinear(linear, summed=True, start=START, allowed=allowed)
        optimizer = make(layer.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(5, IN)).square().sum().backward()
            optimizer.step()
        assert not layer.values[~allowed].any()
        assert layer.values[allowed].all()


@pytest.mark.parametrize("wide", [True, False], ids=["fp32 base", "bf16 base"])
def test_small_changes_do_not_drown_in_16_bits(wide: bool) -> None:
    """The sum of weight and change, rounded to bfloat16, would be the weight itself."""
    linear = linear_of(OUT, IN, dtype=torch.float32 if wide else torch.bfloat16)
    layer = DenseLinear(linear, summed=False)
    with torch.no_grad():
        layer.values.fill_(1e-4)
    x = torch.full((1, IN), 1.0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        moved = torch.from_numpy((layer(x) - linear(x)).float().numpy())
        product = F.linear(x, layer.difference())
    assert product.float().mean() == pytest.approx(IN * 1e-4, rel=0.01)
    assert moved.shape == (1, OUT)
    summed = (linear.weight.float() + layer.values).bfloat16()
    assert (summed == linear.weight.bfloat16()).float().mean() > 0.5


def test_a_checkpoint_keeps_values_mask_and_anchor() -> None:
    layer = layer_of(summed=True, masked=True)
    layer.anchor = layer.values.detach() * 0.5
    kept = {name: tensor.clone() for name, tensor in layer.trained_state().items()}
    other = layer_of(summed=True)
    with torch.no_grad():
        other.values.zero_()
    other.load_trained_state(kept)
    assert other.trained_state().keys() == {"values", "mask", "anchor"}
    for name, tensor in other.trained_state().items():
        assert torch.equal(tensor, kept[name])
    other.load_trained_state({"values": kept["values"]})
    assert other.mask is None
    assert other.anchor is None
