"""Bases whose weights an adapter cannot change, all or some of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, PreTrainedConfig

from gossamer.base.load import BaseFiles
from gossamer.training.errors import ConfigError, UnknownTargetError, UntrainableBaseError
from tests.tiny import tiny_tokenizer
from tests.training.support import Recorder, run_of, tiny_base


def made(config: PreTrainedConfig, folder: Path) -> BaseFiles:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer(320).save_pretrained(folder)
    return tiny_base(folder)


def test_a_base_without_linear_layers_is_refused(tmp_path: Path, data: Path) -> None:
    config = GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=320, n_positions=256, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    base = made(config, tmp_path)
    for method in ("sparta", "lota", "mcs", "full"):
        with pytest.raises(UntrainableBaseError, match=r"torch.nn.Linear.* Conv1D") as caught:
            run_of(base, data, method, {"targets": "all-linear"})
        assert caught.value.others == ("Conv1D",)


def test_experts_that_cannot_be_trained_are_told(tmp_path: Path, data: Path) -> None:
    config = MixtralConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, intermediate_size=112, num_local_experts=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    base = made(config, tmp_path)
    told = Recorder()
    result = run_of(base, data, "sparta", {"targets": "all-linear"}, max_steps=1, watcher=told)
    assert {name.split(".")[-3] for name in result.delta_set.deltas} == {"self_attn"}
    assert told.events[0].untrainable == ("MixtralExperts", "MixtralTopKRouter")
    assert "MixtralExperts, MixtralTopKRouter are in no torch" in told.events[0].warning
    for targets in ("down", "re:experts"):
        for method in ("sparta", "lota"):
            with pytest.raises(UnknownTargetError, match="q_proj, v_proj, and the weights of") as c:
                run_of(base, data, method, {"targets": targets})
            assert "MixtralExperts" in c.value.others


def test_of_an_ordinary_base_there_is_nothing_to_tell(base: BaseFiles, data: Path) -> None:
    told = Recorder()
    run_of(base, data, "sparta", {}, max_steps=1, watcher=told)
    assert told.events[0].untrainable == ()
    assert told.events[0].warning == ""


def test_evaluations_without_held_out_examples_are_refused(base: BaseFiles, data: Path) -> None:
    with pytest.raises(ConfigError, match="no held-out examples") as caught:
        run_of(base, data, "sparta", {}, eval_steps=2)
    assert caught.value.field == "eval_steps"
