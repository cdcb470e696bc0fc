"""Tiny random language models of every architecture that the tests care about.

Each is a real transformers model, deterministic for (architecture, tied, seed), float32, in eval
mode, and has what makes its architecture hard to serve at a size where it matters: sliding windows
shorter than a test's prompt, soft-caps that bend the logits they meet, heads wider than
hidden / heads.
Weights are scaled so that greedy decoding does not hang on a coin flip: the logits have a standard
deviation of about 3, and the best leads the second by about 0.5 in the median.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 320
SLIDING_WINDOW = 8
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD_ID, BOS_ID, EOS_ID = range(3)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = (
    "The base model stays in memory and every request brings its own small difference.",
    "A sparse adapter changes a few weights and leaves the rest of the model as it was.",
    "What is the capital of France? The capital of France is Paris.",
    "Two adapters may be merged into one with weights, and one batch may hold them all.",
    "She sells sea shells on the sea shore, and the shells that she sells are sea shells.",
    "Count to ten: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10. Then count back to one again.",
)

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "dtype": "float32",
}

#: arch → its configuration. Head width 32 where it is independent of hidden / heads = 16.
CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": lambda **kw: MistralConfig(sliding_window=SLIDING_WINDOW, **kw),
    "qwen2": Qwen2Config,
    "qwen3": lambda **kw: Qwen3Config(head_dim=32, **kw),
    "gemma2": lambda **kw: Gemma2Config(
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=SLIDING_WINDOW,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=10.0,
        **kw,
    ),
    "phi3": Phi3Config,
}
ARCHS = tuple(CONFIGS)


def tiny_model(
    arch: str, *, tied: bool | None = None, seed: int = 0, vocab_size: int = VOCAB_SIZE
) -> PreTrainedModel:
    """A random model of `arch` (one of `ARCHS`).

    `tied` shares the embedding with the output projection; by default as the architecture's
    released models do: Gemma 2 tied, the others not. Attention is eager, which honours soft-caps.
    """
    if tied is None:
        tied = arch == "gemma2"
    common = copy.deepcopy(COMMON)  # Phi-3's configuration writes into the rotary parameters
    config = CONFIGS[arch](**common, vocab_size=vocab_size, tie_word_embeddings=tied)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.float().requires_grad_(requires_grad=False).eval()
    for name, parameter in model.named_parameters():
        _fill(name, parameter, seed, unit_offset=arch == "gemma2")
    return model


def _fill(name: str, parameter: torch.Tensor, seed: int, *, unit_offset: bool) -> None:
    """Values that depend on the seed and the name only, not on the order of parameters."""
    # torch's CPU generator looks at the lower 32 bits of a seed only
    random = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    values = torch.randn(parameter.shape, generator=random)
    if parameter.dim() == 1 and name.endswith("bias"):
        values *= 0.3
    elif parameter.dim() == 1:
        values = values * 0.1 + _norm_mean(name, unit_offset=unit_offset)
    elif "embed_tokens" in name or "lm_head" in name:
        values *= (0.8 if unit_offset else 3.0) / parameter.shape[1] ** 0.5
    else:
        values *= 1.5 / parameter.shape[1] ** 0.5
    parameter.copy_(values)


def _norm_mean(name: str, *, unit_offset: bool) -> float:
    if not unit_offset:
        return 1.0
    # Gemma's norms are stored as what to add to one. Its embedding enters the layers sqrt(hidden)
    # times as large: unless it is small and their outputs are not, a tied model repeats the token
    # that it has just read. The last norm gives the logits their size back.
    if name == "model.norm.weight":
        return 2.75
    return 4.0 if "post_" in name else 0.0


def tiny_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `vocab_size` (≥ 259) tokens, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the sentences yield {tokenizer.get_vocab_size()} tokens at most")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[PAD_ID],
        bos_token=SPECIAL_TOKENS[BOS_ID],
        eos_token=SPECIAL_TOKENS[EOS_ID],
        chat_template=CHAT_TEMPLATE,
        model_max_length=COMMON["max_position_embeddings"],
    )


def save_tiny(model: PreTrainedModel, path: Path) -> Path:
    """Write the model and a tokenizer of its vocabulary as a Hugging Face directory; the path."""
    model.save_pretrained(path)
    tiny_tokenizer(model.config.vocab_size).save_pretrained(path)
    return path
