"""Drawing many rows' tokens together, on a device.

Row by row, drawing takes up to 32 operations and six waits for the device a row; at 64 rows that is
more than a decode step of an 8B model. Here it is a dozen operations and one wait for all rows that
have no other rules than temperature, min_p, top_k and top_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Candidates looked at for top_p; see `gossamer.engine.sampler`.
NUCLEUS_GUESS = 1024


@dataclass(frozen=True)
class Rules:
    """How one row is drawn.

    Attributes:
        temperature: above 0.
        min_p, top_k, top_p: 0, 0 and 1 where they do not apply.
        u: in [0, 1): where in the distribution the token lies.
    """

    temperature: float
    min_p: float
    top_k: int
    top_p: float
    u: float


def draw(logits: Tensor, rules: Sequence[Rules]) -> list[int | None]:
    """A token a row, by the same rules as `Chooser` has.

    Args:
        logits: float32 [rows, vocab].
        rules: one a row.

    Returns:
        None for a row whose nucleus is wider than the candidates that were looked at.
    """
    table = torch.tensor(
        [[r.temperature, r.min_p, r.top_k, r.top_p, r.u] for r in rules], dtype=torch.float64
    ).to(logits.device, non_blocking=True)
    temperature, min_p, _, top_p = table[:, :4].float().unbind(1)
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    least = min_p * probs.amax(-1)
    probs = torch.where(probs >= least[:, None], probs, 0.0)
    vocab = logits.shape[1]
    tokens = _invert(probs, table[:, 4])
    sure = torch.ones_like(tokens, dtype=torch.bool)
    narrowed = [r.top_k > 0 or r.top_p < 1 for r in rules]
    if any(narrowed):
        count = min(max(r.top_k if r.top_k > 0 else NUCLEUS_GUESS for r in rules), vocab)
        kept, candidates = probs.topk(count)
        limit = torch.where(table[:, 2] > 0, table[:, 2], float(vocab))
        inside = torch.arange(count, device=logits.device)[None, :] < limit[:, None]
        kept = torch.where(inside, kept, 0.0)
        whole = probs.sum(-1)
        by_count = table[:, 2] > 0
        enough = kept.sum(-1) >= top_p * whole
        sure = by_count | (top_p >= 1) | enough | (count == vocab)
        total = torch.where(by_count, kept.sum(-1), whole)
        before = kept.cumsum(-1) - kept
        nucleus = before < (top_p * total)[:, None]
        nucleus[:, 0] = True  # the likeliest stays, however small top_p is
        kept = torch.where(nucleus | (top_p >= 1)[:, None], kept, 0.0)
        place = _invert(kept, table[:, 4])
        among = candidates.gather(1, place[:, None])[:, 0]
        chosen = torch.tensor(narrowed).to(logits.device, non_blocking=True)
        tokens, sure = torch.where(chosen, among, tokens), sure | ~chosen
    found = torch.stack([tokens, sure.to(tokens.dtype)], dim=1).tolist()
    return [token if is_sure else None for token, is_sure in found]


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """By row the index at which the cumulative weight passes u of the total; never one of weight
    0."""
    cumulative = weights.double().cumsum(-1)
    target = u * cumulative[:, -1]
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return found.clamp_max(weights.shape[1] - 1)
