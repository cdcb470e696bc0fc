"""A tiny Llama as a GGUF file, and as a wheel that carries one."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from transformers import PreTrainedModel

from tests.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer

NORMAL, CONTROL = 1, 3

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    split: str = "smollm",
    more: Callable[[Any], None] = lambda writer: None,
) -> Path:
    """Write a tiny Llama as float32 GGUF. `split` is its `tokenizer.ggml.pre`; `more` may add."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size, split)
    for name, parameter in model.named_parameters():
        writer.add_tensor(_gguf_name(name), _values(name, parameter, config))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def wheel_of(gguf: Path, member: str) -> bytes:
    """A wheel that holds a GGUF file under the name `member`, and something else."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("tiny/__init__.py"), "raise SystemExit('never run')")
        archive.writestr(zipfile.ZipInfo(member), gguf.read_bytes())
    return buffer.getvalue()


def _add_tokenizer(writer: Any, vocab_size: int, split: str) -> None:
    bpe = json.loads(tiny_tokenizer(vocab_size).backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if t in SPECIAL_TOKENS else NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _gguf_name(name: str) -> str:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, _, layer, *module, kind = name.split(".")
    return f"blk.{layer}.{LAYER_NAMES['.'.join(module)]}.{kind}"


def _values(name: str, parameter: torch.Tensor, config: Any) -> np.ndarray:
    """The values in llama.cpp's order, which interleaves the two halves of every q and k head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    values = parameter.detach().numpy()
    count = heads.get(name.split(".")[-2])
    if count is None:
        return values
    halves = values.reshape(count, 2, values.shape[0] // count // 2, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
