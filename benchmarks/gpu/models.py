"""Models of a shape with random weights, made where they are used: nothing is downloaded."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.roofline.models import Model

_POSITIONS = 8192
#: How much a layer adds to what it is given, per product that it ends with. Small, so that bf16
#: rounds alike in the engine and in transformers, whose logits the engine compares itself with.
_ADDED = 0.02


def random_model(model: Model, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM of this shape. Built without memory, then given some, then filled."""
    kind: Callable[..., PreTrainedConfig] = LlamaConfig
    if model.name.startswith("mistral"):
        kind = functools.partial(MistralConfig, sliding_window=None)
    config = kind(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=model.tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager"
        )
    made.to_empty(device=device)
    # Its buffers are no parameters, and are in no state that could be loaded: made anew.
    with torch.device(device):
        made.model.rotary_emb = type(made.model.rotary_emb)(config)
    made.requires_grad_(requires_grad=False).eval()
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, _deviation(name, parameter.shape[1]))
    return made


def _deviation(name: str, columns: int) -> float:
    if "embed_tokens" in name:
        return 1.0
    if "o_proj" in name or "down_proj" in name:
        return _ADDED / math.sqrt(columns)
    return 1 / math.sqrt(columns)


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A tokenizer in which every token is a word of its own."""
    vocabulary = {f"w{i}": i for i in range(words)}
    unknown, end = "w0", "w1"
    made = Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown, eos_token=end)
