"""GGUF files: what arrives, and what is refused because it would not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.base.convert import convert_gguf
from gossamer.base.errors import CorruptBaseError, UnsupportedBaseError
from gossamer.base.fetch import Stage
from gossamer.base.fingerprint import fingerprint
from gossamer.base.load import BaseFiles, load_model, load_tokenizer
from tests.base.tiny_gguf import write_gguf
from tests.tiny import tiny_model, tiny_tokenizer

TEXT = "What is the capital of France?   12\n\n34 <|im_end|>"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source" / "tiny.gguf"


@pytest.mark.parametrize("tied", [False, True])
def test_a_converted_model_is_the_model(tied: bool, source: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", tied=tied)
    stages: list[Stage] = []
    digest = convert_gguf(
        write_gguf(model, source), tmp_path / "out", lambda stage, *_: stages.append(stage)
    )
    assert digest == fingerprint(model)
    base = BaseFiles("tiny", tmp_path / "out", digest)
    loaded = load_model(base)
    tokens = torch.arange(3, 40).reshape(1, -1)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert stages == ["convert", "convert", "check", "check"]


def test_a_converted_directory_is_a_plain_checkpoint(source: Path, tmp_path: Path) -> None:
    convert_gguf(write_gguf(tiny_model("llama"), source), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [config[key] for key in ids] == [generation[key] for key in ids] == [1, 2, 0]


def test_the_tokenizer_arrives_with_its_template_and_its_special_tokens(
    source: Path, tmp_path: Path
) -> None:
    convert_gguf(write_gguf(tiny_model("llama"), source, split="gpt-2"), tmp_path / "out")
    tokenizer, original = load_tokenizer(BaseFiles("t", tmp_path / "out", "")), tiny_tokenizer()
    assert tokenizer.encode(TEXT) == original.encode(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.model_max_length == 1024
    chat = [{"role": "user", "content": "hello"}]
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    got = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert got == expected


def test_digits_are_split_off_before_the_spaces_around_them_are_grouped(
    source: Path, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    convert_gguf(write_gguf(model, source, split="gpt-2"), tmp_path / "gpt2")
    convert_gguf(write_gguf(model, source, split="smollm"), tmp_path / "smollm")
    cut = [
        load_tokenizer(BaseFiles("t", tmp_path / kind, "")).backend_tokenizer.pre_tokenizer
        for kind in ("gpt2", "smollm")
    ]
    # GPT-2 keeps the last space or line feed for the number, and the number in one piece
    assert [piece for piece, _ in cut[0].pre_tokenize_str("a   12\n\n3")] == [
        *("a", "ĠĠ", "Ġ12", "Ċ", "Ċ", "3")
    ]
    assert [piece for piece, _ in cut[1].pre_tokenize_str("a   12\n\n3")] == [
        *("a", "ĠĠĠ", "1", "2", "ĊĊ", "3")
    ]


def rope_frequencies(writer: Any) -> None:
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))


def attention_bias(writer: Any) -> None:
    writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32))


@pytest.mark.parametrize("more", [rope_frequencies, attention_bias])
def test_weights_that_transformers_would_drop_are_refused(
    more: Callable[[Any], None], source: Path, tmp_path: Path
) -> None:
    write_gguf(tiny_model("llama"), source, more=more)
    with pytest.raises(UnsupportedBaseError, match="of which transformers' LlamaForCausalLM takes"):
        convert_gguf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rotary_scaling_that_transformers_would_ignore_is_refused(
    source: Path, tmp_path: Path
) -> None:
    write_gguf(
        tiny_model("llama"),
        source,
        more=lambda writer: writer.add_string("llama.rope.scaling.type", "yarn"),
    )
    with pytest.raises(UnsupportedBaseError, match=r"ignores its rotary scaling \(yarn\)"):
        convert_gguf(source, tmp_path / "out")


def test_a_tokenizer_of_an_unknown_kind_is_refused(source: Path, tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), source, split="of-tomorrow")
    with pytest.raises(UnsupportedBaseError, match=r"splits text \(of-tomorrow\)"):
        convert_gguf(source, tmp_path / "out")


def test_a_missing_tensor_is_refused(source: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    del model.model.layers[1].mlp.up_proj.weight
    write_gguf(model, source)
    with pytest.raises(CorruptBaseError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_gguf(source, tmp_path / "out")


def test_another_architecture_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), source)
    source.write_bytes(source.read_bytes().replace(b"llama", b"klaxo"))
    with pytest.raises(UnsupportedBaseError, match="klaxo"):
        convert_gguf(source, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 2_000, -1_000])
def test_a_damaged_file_is_named(keep: int, source: Path, tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), source)
    source.write_bytes(source.read_bytes()[:keep])
    with pytest.raises((CorruptBaseError, UnsupportedBaseError)) as error:
        convert_gguf(source, tmp_path / "out")
    assert "tiny.gguf" in str(error.value)


def test_another_file_is_not_taken_for_gguf(source: Path, tmp_path: Path) -> None:
    source.write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(CorruptBaseError, match="does not begin like a GGUF file"):
        convert_gguf(source, tmp_path / "out")
