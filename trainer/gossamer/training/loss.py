"""The loss of a language model over its logits, without a second copy of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gossamer.training.batches import IGNORED

#: Bytes of logits that are worked on at a time: of a CPU's cache, or enough for a GPU's kernels.
_PART = {"cpu": 4 << 20}
_PART_ELSEWHERE = 128 << 20


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy in nats, summed over the labels that count.

    The gradient is computed at once and overwrites the logits. 512 tokens of a vocabulary of 49 152
    are 100 MB; `F.cross_entropy` holds the log-probabilities and the gradient beside them.

    Args:
        logits: float32 [tokens, vocabulary]; what they hold afterwards is of no use.
        labels: int64 [tokens]; `IGNORED` where nothing is to be predicted.

    Returns:
        A scalar. Its backward pass works once.
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits, labels)
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        # Not marked as changed: nothing that made them needs them again, and if something did,
        # its backward pass would raise, for the version that it saved is gone.
        gradient = logits.detach()
        nbytes = _PART.get(logits.device.type, _PART_ELSEWHERE)
        rows = max(1, nbytes // (4 * max(1, logits.shape[-1])))
        loss = logits.new_zeros((), dtype=torch.float64)
        for part, wanted in zip(gradient.split(rows), labels.split(rows), strict=True):
            loss += _in_place(part, wanted)
        ctx.save_for_backward(gradient)
        return loss.to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_output), None


def _in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of a few rows, which become its gradient: softmax - onehot, or 0."""
    counted = labels != IGNORED
    places = torch.where(counted, labels, 0).unsqueeze(-1)
    logits.sub_(logits.amax(-1, keepdim=True))
    right = logits.gather(-1, places).squeeze(-1)
    sums = logits.exp_().sum(-1, keepdim=True)
    losses = sums.squeeze(-1).log() - right
    logits.div_(sums)
    logits.scatter_add_(-1, places, torch.full_like(sums, -1.0))
    logits.masked_fill_(~counted.unsqueeze(-1), 0.0)
    return torch.where(counted, losses, 0.0).sum(dtype=torch.float64)
