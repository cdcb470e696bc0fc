"""Which tensor of a checkpoint is which parameter, what is tied, and what no adapter carries."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from gossamer.base.load import BaseFiles
from gossamer.base.weights import StoredWeights
from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.checkpoint import FORMAT
from gossamer.store.exchange.checkpoint_names import match
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import ImportOptions
from tests.exchange.checkpoints import (
    CONFIG,
    EMBEDDING,
    HEAD,
    NORM,
    UP,
    WEIGHTS,
    TensorMap,
    TinyDir,
    change,
    configure,
    expected,
    read,
    tuned,
)
from tests.exchange.support import FINGERPRINT, assert_same_deltas, load


@pytest.fixture(scope="module")
def base(tiny_dir: TinyDir) -> StoredWeights:
    return StoredWeights.of(BaseFiles("tiny", tiny_dir("llama"), FINGERPRINT))


@pytest.fixture(scope="module")
def tied(tiny_dir: TinyDir) -> StoredWeights:
    return StoredWeights.of(BaseFiles("tied", tiny_dir("llama", tied=True), FINGERPRINT))


@pytest.fixture
def copy(base: StoredWeights, tmp_path: Path) -> Path:
    """A copy of the base's folder, to be changed."""
    return Path(shutil.copytree(base.folder, tmp_path / "copy"))


# What is tied


def test_a_checkpoint_that_stores_a_tied_head_too_is_read(
    tied: StoredWeights, tmp_path: Path
) -> None:
    model = tuned(tied)
    model.save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert_same_deltas(read(tmp_path, tied).delta_set.deltas, expected(model, tied))


def test_a_checkpoint_that_stores_the_head_only_is_read(
    tied: StoredWeights, tmp_path: Path
) -> None:
    model = tuned(tied)
    model.save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    assert_same_deltas(read(tmp_path, tied).delta_set.deltas, expected(model, tied))

    def edit(tensors: TensorMap) -> None:
        tensors[HEAD][3, :7] += 1

    with pytest.raises(AdapterFileError, match=r"lm_head\.weight \(7 of 20,480 el") as refused:
        read(change(tmp_path, edit), tied)
    assert refused.value.code == "unsupported_module"
    grown = change(tmp_path, lambda tensors: tensors.update({HEAD: torch.ones(328, 64)}))
    with pytest.raises(AdapterFileError, match="328 rows, 320 here: tokens were added"):
        read(grown, tied)


def test_names_are_matched_without_reading_a_weight(tied: StoredWeights, tmp_path: Path) -> None:
    tuned(tied).save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    matched = match(Files.at(tmp_path), tied.names)  # which reads none
    assert [twin.name for twin in matched.twins] == [HEAD]
    assert matched.places.keys() == tied.parameters.keys()


def test_a_head_that_has_left_its_embedding_is_refused(tied: StoredWeights, tmp_path: Path) -> None:
    load(tied.folder).save_pretrained(tmp_path)

    def edit(tensors: TensorMap) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][3, :7] += 1

    with pytest.raises(AdapterFileError, match=r"lm_head\.weight \(7 of 20,480 el") as refused:
        read(change(tmp_path, edit), tied)
    assert (refused.value.code, refused.value.tensor) == ("unsupported_module", HEAD)


def test_a_checkpoint_of_the_bare_model_is_read(tied: StoredWeights, tmp_path: Path) -> None:
    model = tuned(tied)
    model.save_pretrained(tmp_path / "whole")
    bare = AutoModel.from_pretrained(tmp_path / "whole", local_files_only=True)
    bare.save_pretrained(tmp_path / "bare")
    assert not any(n.startswith("model.") for n in load_file(tmp_path / "bare" / WEIGHTS))
    assert_same_deltas(read(tmp_path / "bare", tied).delta_set.deltas, expected(model, tied))


def test_a_checkpoint_that_ties_what_the_base_stores_twice_is_read(
    base: StoredWeights, copy: Path, tmp_path: Path
) -> None:
    def twice(tensors: TensorMap) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()

    own = StoredWeights.of(BaseFiles("own", change(copy, twice), FINGERPRINT))
    assert HEAD in own.parameters
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    configure(change(other, lambda tensors: tensors.pop(HEAD)), tie_word_embeddings=True)
    assert read(other, own).facts["nnz"] == 0
    with pytest.raises(AdapterFileError, match="lm_head") as refused:  # the base's own head is not
        read(other, base)
    assert refused.value.code == "unsupported_module"


# What an adapter cannot carry


@pytest.mark.parametrize("name", [NORM, EMBEDDING, HEAD, "model.layers.0.input_layernorm.weight"])
def test_other_changes_are_refused_by_name(base: StoredWeights, copy: Path, name: str) -> None:
    def edit(tensors: TensorMap) -> None:
        tensors[name].view(-1)[2:5] += 0.5
        tensors[UP] += 1

    with pytest.raises(AdapterFileError, match=r"\(3 of [0-9,]+ elements\)") as refused:
        read(change(copy, edit), base)
    assert (refused.value.code, refused.value.tensor) == ("unsupported_module", name)


def test_changed_biases_are_refused(tiny_dir: TinyDir, tmp_path: Path) -> None:
    base = StoredWeights.of(BaseFiles("qwen", tiny_dir("qwen2"), FINGERPRINT))
    model, name = load(base.folder), "model.layers.0.self_attn.q_proj.bias"
    model.get_parameter(name).add_(1)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError) as refused:
        read(tmp_path, base)
    assert (refused.value.code, refused.value.tensor) == ("unsupported_module", name)


def test_four_changed_norms_are_three_and_one_more(base: StoredWeights, copy: Path) -> None:
    norms = [name for name in base.parameters if "layernorm" in name][:4]

    def edit(tensors: TensorMap) -> None:
        for name in norms:
            tensors[name] += 1

    with pytest.raises(AdapterFileError, match="and 1 more"):
        read(change(copy, edit), base)


def test_added_tokens_are_refused(base: StoredWeights, tmp_path: Path) -> None:
    model = load(base.folder)
    model.resize_token_embeddings(328)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="328 rows, 320 here: tokens were added") as refused:
        read(tmp_path, base)
    assert (refused.value.code, refused.value.tensor) == ("unsupported_module", EMBEDDING)


def test_buffers_of_older_versions_are_passed_over(base: StoredWeights, copy: Path) -> None:
    buffers = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    more = {name: torch.ones(8) for name in buffers}
    imported = read(change(copy, lambda tensors: tensors.update(more)), base)
    assert imported.facts["buffers_ignored"] == 2


def test_what_the_configurations_disagree_on_is_said(base: StoredWeights, copy: Path) -> None:
    configure(copy, rms_norm_eps=1e-3, max_position_embeddings=9, eos_token_id=5, dtype="bfloat16")
    (warning,) = [text for text in read(copy, base).warnings if CONFIG in text]
    assert "max_position_embeddings, rms_norm_eps;" in warning
    (copy / CONFIG).unlink()
    assert FORMAT.importer is not None
    imported = FORMAT.importer.read(Files.at(copy), base, ImportOptions())
    assert "there is no config.json" in imported.warnings[0]


def test_a_base_without_weights_reads_no_checkpoint(base: StoredWeights, tmp_path: Path) -> None:
    tuned(base).save_pretrained(tmp_path)
    assert FORMAT.importer is not None
    assert not FORMAT.importer.uploadable
    with pytest.raises(AdapterFileError, match="not at hand"):
        FORMAT.importer.read(Files.at(tmp_path), base.names, ImportOptions())
