"""From a directory to a model: exactly what is in the files, and no more noise than that."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig
from transformers.utils import logging as transformers_logging

from gossamer.base.errors import CorruptBaseError, UnsupportedBaseError
from gossamer.base.fingerprint import fingerprint
from gossamer.base.load import (
    BaseFiles,
    load_model,
    load_tokenizer,
    quiet,
    stored_dtype,
    weight_files,
)
from tests.tiny import ARCHS, save_tiny, tiny_model, tiny_tokenizer

TinyDir = Callable[..., Path]
TOKENS = torch.arange(3, 35).reshape(1, -1)


def files(path: Path) -> BaseFiles:
    return BaseFiles(path.name, path, "")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory of a tiny Llama that the test may damage."""
    return save_tiny(tiny_model("llama"), tmp_path / "own")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tiny_architecture_loads_as_it_was(arch: str, tiny_dir: TinyDir) -> None:
    model = load_model(files(tiny_dir(arch)))
    original = tiny_model(arch)
    assert fingerprint(model) == fingerprint(original)
    assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_asked_type_is_given(tiny_dir: TinyDir) -> None:
    model = load_model(files(tiny_dir("llama")), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.gpu
def test_a_model_loads_onto_the_device_and_keeps_its_fingerprint(tiny_dir: TinyDir) -> None:
    model = load_model(files(tiny_dir("llama")), torch.float32, "cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert fingerprint(model) == fingerprint(tiny_model("llama"))


def test_sharded_weights_load(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(weight_files(tmp_path)) > 1
    assert fingerprint(load_model(files(tmp_path))) == fingerprint(model)


def test_loading_is_silent_and_leaves_the_settings_alone(
    tiny_dir: TinyDir, capfd: pytest.CaptureFixture[str]
) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_model(files(tiny_dir("llama")))
    load_tokenizer(files(tiny_dir("llama")))
    assert capfd.readouterr() == ("", "")
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert after == before
    assert after[1], "transformers would have drawn a bar"


def test_quiet_hides_warnings_and_passes_exceptions() -> None:
    with quiet():
        warnings.warn("hidden", stacklevel=1)  # an error in this test suite otherwise
    with pytest.raises(KeyError), quiet():
        raise KeyError("passed")
    with pytest.warns(UserWarning, match="shown"):
        warnings.warn("shown", stacklevel=1)


def test_the_tokenizer_is_the_one_in_the_directory(tiny_dir: TinyDir) -> None:
    tokenizer = load_tokenizer(files(tiny_dir("llama")))
    text = "Count to ten: 1, 2, 3<|im_end|>"
    assert tokenizer.encode(text) == tiny_tokenizer().encode(text)
    assert tokenizer.chat_template


def test_missing_weights_are_never_made_up(own: Path) -> None:
    tensors = load_file(own / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptBaseError, match=r"lack model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(files(own))


def test_weights_of_another_shape_are_refused(own: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises((CorruptBaseError, UnsupportedBaseError), match=r"shape|size"):
        load_model(files(own))


@pytest.mark.parametrize("keep", [0, 7, 100, 50_000, -1])
def test_damaged_weights_are_refused(keep: int, own: Path) -> None:
    weights = own / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CorruptBaseError, match="cannot be read"):
        stored_dtype(own)
    with pytest.raises(CorruptBaseError, match="cannot be read"):
        load_model(files(own))


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CorruptBaseError, match="not the index of a checkpoint"):
        weight_files(tmp_path)


def test_a_model_that_is_not_a_language_model_is_refused(own: Path) -> None:
    BertConfig(hidden_size=32, num_attention_heads=2, is_decoder=False).save_pretrained(own)
    config = json.loads((own / "config.json").read_text()) | {"model_type": "vit"}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedBaseError, match="own cannot be used as a base model"):
        load_model(files(own))


def test_code_that_comes_with_a_model_is_never_run(own: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    config |= {
        "model_type": "novel",
        "auto_map": {
            "AutoConfig": "modeling_novel.NovelConfig",
            "AutoModelForCausalLM": "modeling_novel.Novel",
        },
    }
    (own / "config.json").write_text(json.dumps(config))
    (own / "modeling_novel.py").write_text(f"open({str(own / 'ran')!r}, 'w').close()")
    with pytest.raises(UnsupportedBaseError):
        load_model(files(own))
    assert not (own / "ran").exists()


def test_a_directory_without_a_usable_tokenizer_is_refused(own: Path) -> None:
    (own / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedBaseError):
        load_tokenizer(files(own))


def test_the_stored_type_is_the_narrowest_that_loses_nothing(own: Path) -> None:
    weights = own / "model.safetensors"
    assert stored_dtype(own) == torch.float32
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    assert stored_dtype(own) == torch.bfloat16
    save_file(tensors | {"position_ids": torch.arange(3)}, weights)
    assert stored_dtype(own) == torch.bfloat16, "only weights count"
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].float()}, weights)
    assert stored_dtype(own) == torch.float32
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].double()}, weights)
    with pytest.raises(UnsupportedBaseError, match=r"model\.norm\.weight is stored as F64"):
        stored_dtype(own)
