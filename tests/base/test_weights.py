"""The base as importers and exporters see it: its files' names, shapes and values, as loaded."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from gossamer.base.errors import CorruptBaseError, UnsupportedBaseError
from gossamer.base.load import BaseFiles, load_model
from gossamer.base.patch_map import adapter_table
from gossamer.base.weights import BaseNames, StoredWeights
from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.values import from_carrier
from tests.tiny import ARCHS, save_tiny, tiny_model

TinyDir = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PRINT = "ab" * 32


def files(path: Path) -> BaseFiles:
    return BaseFiles("tiny", path, PRINT)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory of a tiny Llama that the test may damage."""
    return save_tiny(tiny_model("llama"), tmp_path / "own")


def assert_reads(weights: StoredWeights, model: PreTrainedModel) -> None:
    """Names, shapes and values of the model, and nothing else."""
    parameters = dict(model.named_parameters())
    assert {n: tuple(p.shape) for n, p in parameters.items()} == dict(weights.parameters)
    assert dict(weights.table) == adapter_table(model)
    for name, parameter in parameters.items():
        found, dtype = weights.read(name)
        assert np.array_equal(from_carrier(found, dtype), parameter.float().numpy()), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_reads_as_it_loads(arch: str, tied: bool, tiny_dir: TinyDir) -> None:
    base = files(tiny_dir(arch, tied=tied))
    weights: BaseWeights = StoredWeights.of(base)
    assert (weights.name, weights.fingerprint, weights.folder) == ("tiny", PRINT, base.path)
    assert isinstance(weights, StoredWeights)
    assert_reads(weights, load_model(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_come_as_they_are_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    weights = StoredWeights.of(files(save_tiny(model, tmp_path)))
    assert (
        weights.read("model.norm.weight")[1]
        == {
            torch.bfloat16: "BF16",
            torch.float16: "F16",
        }[dtype]
    )
    assert_reads(weights, model)


def test_shards_are_read(own: Path) -> None:
    model = tiny_model("llama")
    (own / "model.safetensors").unlink()
    model.save_pretrained(own, max_shard_size="40KB")
    assert len(list(own.glob("model-*.safetensors"))) > 3
    assert_reads(StoredWeights.of(files(own)), model)


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_a_tied_parameter_is_read_by_either_name(stored: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tied=True)
    path = save_tiny(model, tmp_path)
    tensors = load_file(path / "model.safetensors")
    embedding = tensors.pop(EMBEDDING)
    names = {"embedding": [EMBEDDING], "head": [HEAD], "both": [EMBEDDING, HEAD]}[stored]
    tensors |= {name: embedding.clone() for name in names}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    weights = StoredWeights.of(files(path))
    assert_reads(weights, load_model(files(path)))
    assert HEAD not in weights.parameters
    assert np.array_equal(weights.read(HEAD)[0], weights.read(EMBEDDING)[0])


def test_what_is_tied_by_the_configuration_only_is_two_parameters(tmp_path: Path) -> None:
    path = save_tiny(tiny_model("llama", tied=True), tmp_path)
    tensors = load_file(path / "model.safetensors")
    save_file(
        {**tensors, HEAD: tensors[EMBEDDING] + 1}, path / "model.safetensors", {"format": "pt"}
    )
    weights = StoredWeights.of(files(path))
    assert HEAD in weights.parameters
    assert_reads(weights, load_model(files(path)))


@pytest.mark.parametrize("kind", ["own", "tied", "tied by the configuration only"])
def test_a_loaded_model_has_the_names_that_its_files_have(kind: str, tmp_path: Path) -> None:
    path = save_tiny(tiny_model("llama", tied=kind != "own"), tmp_path)
    if kind.startswith("tied by"):
        tensors = load_file(path / "model.safetensors")
        more = {**tensors, HEAD: tensors[EMBEDDING] + 1}
        save_file(more, path / "model.safetensors", {"format": "pt"})
    stored = StoredWeights.of(files(path)).names
    assert BaseNames.of_model(files(path), load_model(files(path))) == stored
    assert stored.aliases == ({HEAD: EMBEDDING} if kind == "tied" else {})


def test_names_without_the_prefix_are_found(tmp_path: Path) -> None:
    path = save_tiny(tiny_model("llama", tied=True), tmp_path / "whole")
    bare = AutoModel.from_pretrained(path, local_files_only=True)
    for file in path.glob("*.safetensors"):
        file.unlink()
    bare.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").rename(path / "model.safetensors")
    assert all(not name.startswith("model.") for name in load_file(path / "model.safetensors"))
    assert_reads(StoredWeights.of(files(path)), load_model(files(path)))


def test_one_tensor_is_read_at_a_time(own: Path) -> None:
    weights = StoredWeights.of(files(own))
    largest = max(int(np.prod(shape)) for shape in weights.parameters.values()) * 4
    tracemalloc.start()
    for name in weights.parameters:
        weights.read(name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * largest + 500_000  # the header, parsed


@pytest.mark.parametrize("name", ["nowhere.weight", "model.layers.9.mlp.up_proj.weight", ""])
def test_an_unknown_name_is_refused(name: str, tiny_dir: TinyDir) -> None:
    with pytest.raises(AdapterFileError, match="hold no weight") as refused:
        StoredWeights.of(files(tiny_dir("llama"))).read(name)
    assert (refused.value.code, refused.value.tensor) == ("unsupported_module", name)


def test_other_dtypes_are_refused(own: Path) -> None:
    tensors = load_file(own / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    weights = StoredWeights.of(files(own))
    weights.read("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(AdapterFileError, match="F64") as refused:
        weights.read("model.norm.weight")
    assert refused.value.code == "unsupported_module"


def test_names_alone_know_no_values(tiny_dir: TinyDir) -> None:
    base = files(tiny_dir("llama", tied=True))
    names: BaseWeights = BaseNames.of(base)
    whole = StoredWeights.of(base)
    assert (names.name, names.fingerprint, names.folder) == ("tiny", PRINT, None)
    assert names.table == whole.table
    assert names.parameters == whole.parameters
    assert names.aliases == whole.aliases == {HEAD: EMBEDDING}
    with pytest.raises(AdapterFileError, match="not at hand") as refused:
        names.read("model.norm.weight")
    assert refused.value.code == "unsupported_module"


def test_damaged_files_are_named(own: Path) -> None:
    tensors = load_file(own / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptBaseError, match=r"model\.norm\.weight has the shape"):
        StoredWeights.of(files(own))
    (own / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(CorruptBaseError):
        StoredWeights.of(files(own))


def test_two_names_of_one_weight_are_refused(own: Path) -> None:
    tensors = load_file(own / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptBaseError, match="which are one weight"):
        StoredWeights.of(files(own))


def test_another_model_is_refused(own: Path) -> None:
    (own / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UnsupportedBaseError):
        BaseNames.of(files(own))
