"""The tiny models have the properties that other tests rely on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny import ARCHS, EOS_ID, VOCAB_SIZE, tiny_model, tiny_tokenizer

PROMPT = "A sparse adapter changes a few weights and leaves the rest"


def continued(model: PreTrainedModel) -> torch.Tensor:
    prompt = torch.tensor([tiny_tokenizer().encode(PROMPT)])
    tokens: torch.Tensor = model.generate(  # type: ignore[operator]
        prompt, max_new_tokens=40, do_sample=False, eos_token_id=None
    )
    return tokens


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_decoding_is_decided_and_does_not_loop(arch: str, tied: bool) -> None:
    model = tiny_model(arch, tied=tied)
    tokens = continued(model)
    logits = model(tokens).logits[0]
    best, second = logits.topk(2).values.unbind(-1)
    assert (best - second).median() > 0.2
    assert (best - second).min() > 1e-3
    assert len(set(tokens[0, -40:].tolist())) > 15
    tie = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tie == tied


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_depends_on_its_seed_alone(arch: str) -> None:
    logits = [tiny_model(arch, seed=seed)(torch.arange(9)[None]).logits for seed in (0, 0, 1)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=0.1)


@pytest.mark.parametrize(
    ("arch", "setting", "value"),
    [
        ("mistral", "sliding_window", 512),
        ("gemma2", "sliding_window", 512),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
    ],
)
def test_windows_and_soft_caps_are_felt(arch: str, setting: str, value: int | None) -> None:
    model = tiny_model(arch)
    config = copy.deepcopy(model.config)
    assert getattr(config, setting) is not None
    setattr(config, setting, value)
    other = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    other.load_state_dict(model.state_dict())
    tokens = continued(model)
    assert (other(tokens).logits - model(tokens).logits).abs().max() > 0.1


def test_the_architectures_have_the_parts_they_are_there_for() -> None:
    names = {arch: dict(tiny_model(arch).named_parameters()) for arch in ARCHS}
    layer = "model.layers.0"
    assert f"{layer}.self_attn.q_proj.bias" in names["qwen2"]
    assert f"{layer}.self_attn.q_norm.weight" in names["qwen3"]
    assert f"{layer}.pre_feedforward_layernorm.weight" in names["gemma2"]
    assert f"{layer}.self_attn.qkv_proj.weight" in names["phi3"]
    assert f"{layer}.mlp.gate_up_proj.weight" in names["phi3"]
    for arch in ("llama", "mistral", "qwen2", "qwen3", "gemma2"):
        q, k = (names[arch][f"{layer}.self_attn.{part}_proj.weight"] for part in "qk")
        assert q.shape[0] == 2 * k.shape[0]


def test_the_tokenizer_fits_the_models(tiny_dir: Callable[..., Path]) -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.eos_token_id == EOS_ID
    text = "Größe 12\n\tπ <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tiny_dir("llama") == tiny_dir("llama")
    assert tiny_dir("llama", tied=True) != tiny_dir("llama")
