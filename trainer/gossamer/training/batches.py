"""From encoded examples to the tensors of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.training.encode import Encoded

IGNORED = -100


def collate(examples: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Pad on the left, so that the completions of all rows end at the same place.

    The model then computes logits for the last few positions only: on short answers to long
    prompts that saves the output head's share of a step, a fifth on a model of 135 M parameters.

    Returns:
        `input_ids`, `attention_mask` and `position_ids`, int64 [rows, width], and `labels`, int64
        [rows, scored]: what the logits at the last `scored` positions should predict, or −100.
    """
    width = max(example.ids.size for example in examples)
    scored = max(example.scored for example in examples)
    input_ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(examples), width), dtype=torch.int64)
    labels = torch.full((len(examples), width + 1), IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        begin = width - example.ids.size
        ids = torch.from_numpy(example.ids)
        input_ids[row, begin:] = ids
        attention_mask[row, begin:] = 1
        labels[row, begin:width] = _marked(example)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        # one to the left: the logits of a position are about the token after it
        "labels": labels[:, 1:][:, width - scored :].contiguous(),
    }


def pack(examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """All examples behind one another in a single row, without padding.

    Positions begin anew with each example; transformers' masks then keep each to itself. There is
    no attention mask, for that is how it knows.

    Returns:
        `input_ids` and `position_ids`, int64 [1, tokens], and `labels` as `collate` has them.
    """
    ids = torch.from_numpy(examples[0].ids)
    first = int(examples[0].ids.size - examples[0].scored)
    if len(examples) > 1:
        ids = torch.cat([torch.from_numpy(example.ids) for example in examples])
    positions = torch.cat([torch.arange(example.ids.size) for example in examples])
    # The first token of an example is never trained, so nothing is predicted over a border.
    labels = torch.cat([_marked(example) for example in examples] + [torch.tensor([IGNORED])])
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "labels": labels[None, 1 + first :].contiguous(),
    }


def _marked(example: Encoded) -> Tensor:
    """The ids of what is trained; −100 elsewhere."""
    return torch.from_numpy(example.ids).masked_fill(~torch.from_numpy(example.trained), IGNORED)
