"""Packing is refused for models whose examples would see each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

from gossamer.base.load import frozen
from gossamer.training.errors import ConfigError
from gossamer.training.packing import check_packing
from tests.tiny import ARCHS, COMMON, VOCAB_SIZE, save_tiny, tiny_model
from tests.training.support import counting_examples, run_of, tiny_base, write_jsonl


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    nn.Module.to(model, dtype)
    return model


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_tell_examples_apart_may_pack(arch: str, dtype: torch.dtype) -> None:
    check_packing(in_dtype(tiny_model(arch), dtype))


def opt(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """It derives positions from the attention mask, and tells the examples of a row by nothing."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=2, word_embed_proj_dim=32, init_std=0.2,
        pad_token_id=COMMON["pad_token_id"], bos_token_id=COMMON["bos_token_id"],
        eos_token_id=COMMON["eos_token_id"],
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return frozen(in_dtype(model, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_derives_positions_from_the_mask_may_not(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"OPTForCausalLM.*see each other") as caught:
        check_packing(opt(dtype))
    assert caught.value.field == "packing"


def test_positions_alone_are_noticed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The neighbours are not seen, but an example behind one has not got its own positions."""
    model = tiny_model("llama")
    rotary = model.model.rotary_emb
    whole = rotary.forward

    def moved(x: torch.Tensor, position_ids: torch.Tensor) -> object:
        # three times as far apart, in an example that does not begin the row
        behind = (position_ids == 0).cumsum(-1) > 1
        return whole(x, torch.where(behind, position_ids * 3, position_ids))

    monkeypatch.setattr(rotary, "forward", moved)
    with pytest.raises(ConfigError, match="see each other"):
        check_packing(model)


def test_a_neighbour_seen_a_little_is_noticed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By less than rounding makes between a packed example and one by itself, in 16 bits."""
    model = tiny_model("llama")
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: head(x) + 0.05 * x[:, :1, :1])
    monkeypatch.setattr(model, "forward", partial(_all_logits, model.forward))
    with pytest.raises(ConfigError, match="see each other"):
        check_packing(model)


def _all_logits(forward: Callable[..., object], logits_to_keep: int, **inputs: object) -> object:
    del logits_to_keep
    return forward(**inputs)


def test_a_run_with_packing_is_refused_before_its_first_step(tmp_path: Path) -> None:
    base = tiny_base(save_tiny(opt(), tmp_path / "base"))
    data = write_jsonl(tmp_path / "data.jsonl", counting_examples(8))
    with pytest.raises(ConfigError, match="packing"):
        run_of(base, data, "sparta", {"targets": "q,v"}, packing=True, max_steps=1)
    assert run_of(base, data, "sparta", {"targets": "q,v"}, max_steps=1).losses
