"""Whether a model keeps the examples of a packed row apart: tried, not looked up."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.base.alike import alike
from gossamer.training.batches import pack
from gossamer.training.encode import Encoded
from gossamer.training.errors import ConfigError
from gossamer.training.trainee import Trainee

#: Tokens of an example that a model is tried with, and of its neighbours.
_SIZE, _NEIGHBOUR = 7, 11
#: Largest difference, relative to the largest logit, that rounding makes in a whole model: measured
#: 2e-6 in float32 and 3e-2 in bfloat16 (SmolLM2-135M). Positions that are not the example's own
#: make one of 0.4 and more.
_ROUNDING = 0.1


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Try whether an example is the same behind one neighbour, behind another, and by itself.

    transformers tells the examples of a row apart by positions that begin anew. Architectures that
    derive positions from the attention mask (OPT), or carry a state along the row, do not look at
    them: there every example would be trained behind its neighbours. Behind two neighbours of one
    length the logits must be alike, since the shapes are. By itself a model rounds otherwise, so
    that comparison is a coarse one: it finds an example that has not got its own positions.

    Costs three forward passes of a few tokens.

    Raises:
        ConfigError: they differ.
    """
    neighbour, other, example = _examples(int(model.config.get_text_config().vocab_size))
    behind, behind_other = (_logits(model, [one, example]) for one in (neighbour, other))
    alone = _logits(model, [example])
    apart = float((behind - alone).abs().max() / alone.abs().max())
    if not alike(behind, behind_other) or not apart <= _ROUNDING:
        problem = (
            f"{type(model).__name__} lets the examples of a packed row see each other; "
            "train without packing"
        )
        raise ConfigError("packing", problem)


def _logits(model: PreTrainedModel, examples: list[Encoded]) -> Tensor:
    """Of the last example, in the model's dtype, which says how much rounding explains."""
    batch = {key: tensor.to(model.device) for key, tensor in pack(examples).items()}
    del batch["labels"]
    return Trainee(model).logits(_SIZE, batch).to(model.dtype)


def _examples(vocab_size: int) -> list[Encoded]:
    """Tokens from all over the vocabulary."""
    sizes = np.array([_NEIGHBOUR, _NEIGHBOUR, _SIZE])
    ids = np.arange(1, sizes.sum() + 1, dtype=np.int64) * 7919 % vocab_size
    parts = np.split(ids, sizes.cumsum()[:-1])
    return [Encoded(part, np.arange(part.size) > 0) for part in parts]
