"""The loss that overwrites its logits, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.training import loss as module
from gossamer.training.batches import IGNORED
from gossamer.training.loss import summed_cross_entropy

WIDTH = 5


def _made(seed: int, tokens: int, vocabulary: int, ignored: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator)
    head = 4.0 * torch.randn(vocabulary, WIDTH, generator=generator)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    return hidden, head, labels


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 90),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    part=st.sampled_from([1, 100, 1 << 20]),
)
def test_agrees_with_float64(
    seed: int, tokens: int, vocabulary: int, ignored: float, part: int
) -> None:
    hidden, head, labels = _made(seed, tokens, vocabulary, ignored)
    exact = hidden.double().requires_grad_()
    wanted = F.cross_entropy(
        exact @ head.double().t(), labels, ignore_index=IGNORED, reduction="sum"
    )
    (wanted / 3.0).backward()
    ours = hidden.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module._PART, "cpu", part)
        found = summed_cross_entropy(ours @ head.t(), labels)
    (found / 3.0).backward()
    assert exact.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_what_is_ignored_may_be_anything() -> None:
    hidden, head, labels = _made(0, 6, 9, 0.0)
    labels[2] = IGNORED
    logits = (hidden @ head.t()).requires_grad_()
    with torch.no_grad():
        logits[2] = torch.nan
    found = summed_cross_entropy(logits * 1.0, labels)
    found.backward()
    assert logits.grad is not None
    assert torch.isfinite(found)
    assert (logits.grad[2] == 0).all()
    assert (logits.grad[3] != 0).any()


def test_a_second_backward_pass_is_refused() -> None:
    hidden, head, labels = _made(0, 6, 9, 0.0)
    found = summed_cross_entropy(hidden.requires_grad_() @ head.t(), labels)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        found.backward()


def test_what_somebody_else_saved_is_not_overwritten_unseen() -> None:
    hidden, head, labels = _made(0, 6, 9, 0.0)
    # tanh keeps its output for its backward pass
    capped = torch.tanh(hidden.requires_grad_() @ head.t())
    with pytest.raises(RuntimeError, match="inplace operation"):
        summed_cross_entropy(capped, labels).backward()
