"""Weight patches replace what the deltas change, and read as what they replace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from gossamer.base.load import BaseFiles
from gossamer.base.weights import StoredWeights
from gossamer.store.delta import Delta, DeltaSet, ValueDtype
from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Exported, ExportOptions, Imported, ImportOptions
from gossamer.store.exchange.registry import detect, importers
from gossamer.store.exchange.weight_patch import FORMAT
from tests.exchange.support import (
    FINGERPRINT,
    TinyBase,
    assert_same_deltas,
    assert_same_logits,
    changed,
    load,
    packed,
    random_set,
)
from tests.tiny import save_tiny, tiny_model

TinyDir = Callable[..., Path]
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"
FILE = "patch.safetensors"


@pytest.fixture(scope="module")
def base(tiny_dir: TinyDir) -> StoredWeights:
    return StoredWeights.of(BaseFiles("tiny", tiny_dir("llama"), FINGERPRINT))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> StoredWeights:
    """The base in bfloat16, as those that train with TRL have it."""
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    folder = save_tiny(model, tmp_path_factory.mktemp("narrow"))
    return StoredWeights.of(BaseFiles("narrow", folder, FINGERPRINT))


def read(folder: Path, base: StoredWeights, **options: Any) -> Imported:
    files = Files.at(folder)
    assert detect(files) == "weight-patch"
    assert FORMAT.importer is not None
    return FORMAT.importer.read(files, base, ImportOptions(**options))


def export(folder: Path, ours: DeltaSet, base: StoredWeights, **options: Any) -> Exported:
    assert FORMAT.exporter is not None
    folder.mkdir(exist_ok=True)
    done = FORMAT.exporter(ours, base, folder, ExportOptions(**options))
    assert [path.name for path in folder.iterdir()] == list(done.files) == [FILE]
    return done


def applied(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """As vLLM applies a sparse patch in checkpoint coordinates.

    Semantics: `w = where(isnan(patch), w, patch)`, the patch NaN but for its positions.
    """
    with safe_open(folder / FILE, "pt") as file:
        for name in json.loads(file.metadata()["changed_params"]):
            indices, values = (file.get_tensor(f"{name}.{end}") for end in ("indices", "values"))
            assert indices.dtype in (torch.int32, torch.int64)
            assert indices.unique().numel() == indices.numel() == values.numel()
            weight = model.get_parameter(name)
            patch = torch.full((weight.numel(),), torch.nan, dtype=values.dtype)
            patch.index_copy_(0, indices.long(), values)
            patch = patch.view(weight.shape).to(weight.dtype)
            weight.copy_(torch.where(patch.isnan(), weight, patch))
    return model


def assert_same_parameters(left: PreTrainedModel, right: PreTrainedModel) -> None:
    wanted = dict(right.named_parameters())
    for name, parameter in left.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


@pytest.mark.parametrize("block_size", [None, 8])
def test_a_patched_model_is_the_merged_one(
    base: StoredWeights, tmp_path: Path, block_size: int | None
) -> None:
    ours = random_set(base, block_size=block_size)
    done = export(tmp_path, ours, base)
    theirs = applied(load(base.folder), tmp_path)
    assert_same_parameters(theirs, changed(base.folder, ours.deltas))
    assert_same_logits(theirs, base.folder, ours.deltas)
    assert done.facts["parameters"] == len(base.table)


def test_in_bfloat16_what_rounding_swallows_is_left_out(
    narrow: StoredWeights, tmp_path: Path
) -> None:
    ours = random_set(narrow, sigma=2e-4)
    done = export(tmp_path, ours, narrow)
    theirs = applied(load(narrow.folder, torch.bfloat16), tmp_path)
    assert_same_parameters(theirs, changed(narrow.folder, ours.deltas, torch.bfloat16))
    assert 0.05 < done.facts["absorbed"] < 0.95
    assert done.facts["nnz"] == pytest.approx(ours.nnz * (1 - done.facts["absorbed"]))
    assert "lost in rounding" in done.warnings[0]
    with safe_open(tmp_path / FILE, "pt") as file:
        keys = file.keys()
        count = sum(file.get_slice(k).get_shape()[0] for k in keys if k.endswith("values"))
        assert {str(file.get_slice(k).get_dtype()) for k in keys} == {"I32", "BF16"}
        metadata = file.metadata()
    assert count == done.facts["nnz"] == int(metadata["total_changed_elements"])
    assert (metadata["format"], metadata["sparse"]) == ("sparse_weight_patch", "True")


def test_what_is_exported_comes_back(
    base: StoredWeights, narrow: StoredWeights, tmp_path: Path
) -> None:
    for n, own in enumerate((base, narrow)):
        folder = tmp_path / str(n)
        export(folder, random_set(own, sigma=2e-3), own)
        imported = read(folder, own)
        export(tmp_path / f"{n} again", imported.delta_set, own)
        assert (folder / FILE).read_bytes() == (tmp_path / f"{n} again" / FILE).read_bytes()
        theirs = applied(load(own.folder), folder)
        assert_same_logits(theirs, own.folder, packed(imported, own).deltas)
        assert imported.facts["unchanged_dropped"] == 0


def saved(folder: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "step_000001.safetensors", metadata or None)
    return folder


def step(base: StoredWeights) -> tuple[dict[str, torch.Tensor], PreTrainedModel]:
    """Flags of what a training step changed, and the model after it, in bfloat16."""
    ours = random_set(base, [UP, DOWN], sigma=0.01)
    model = changed(base.folder, ours.deltas, torch.bfloat16)
    before = load(base.folder, torch.bfloat16)
    masks = {n: model.get_parameter(n) != before.get_parameter(n) for n in (UP, DOWN)}
    return masks, model


def assert_becomes(imported: Imported, base: StoredWeights, model: PreTrainedModel) -> None:
    assert imported.delta_set.base_fingerprint == FINGERPRINT
    merged = changed(base.folder, imported.delta_set.deltas)
    for name, parameter in model.named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter.float()), name


def test_patches_of_trl_are_read(narrow: StoredWeights, tmp_path: Path) -> None:
    masks, model = step(narrow)
    tensors: dict[str, torch.Tensor] = {}
    for name, mask in masks.items():
        flat = mask.flatten().nonzero().squeeze(1).to(torch.int32)
        tensors[f"{name}.indices"] = flat
        tensors[f"{name}.values"] = model.get_parameter(name).flatten()[flat.long()]
    listed = json.dumps(list(masks))
    folder = saved(
        tmp_path, tensors, format="sparse_weight_patch", changed_params=listed, model_version="1"
    )
    imported = read(folder, narrow)
    assert_becomes(imported, narrow, model)
    assert imported.warnings == ()


@pytest.mark.parametrize("encoding", ["raw", "gap_delta", None])
def test_patches_of_trls_later_code_are_read(
    narrow: StoredWeights, tmp_path: Path, encoding: str | None
) -> None:
    masks, model = step(narrow)
    tensors: dict[str, torch.Tensor] = {}
    for name, mask in masks.items():
        flat = mask.flatten().nonzero().squeeze(1)
        tensors[f"{name}.val"] = model.get_parameter(name).flatten()[flat]
        if encoding == "raw":
            tensors[f"{name}.idx"] = flat.to(torch.int32)
        else:
            before = torch.cat([torch.tensor([-1]), flat[:-1]])
            kind = torch.uint16 if name == UP else torch.uint32
            tensors[f"{name}.idx"] = (flat - before - 1).to(kind)
    metadata = {"sparse": "True", "format": "sparse_weight_patch", "model_version": "12"}
    if encoding is not None:
        metadata["encoding"] = encoding
    imported = read(saved(tmp_path, tensors, **metadata), narrow)
    assert_becomes(imported, narrow, model)
    (warning,) = imported.warnings
    assert "step 12 of a run" in warning


def test_names_tell_a_patch_without_metadata(base: StoredWeights, tmp_path: Path) -> None:
    tensors = {
        f"{UP}.indices": torch.tensor([5, 3], dtype=torch.int64),
        f"{UP}.values": torch.tensor([1.0, 2.0]),
        "model.norm.weight.indices": torch.zeros(0, dtype=torch.int32),
        "model.norm.weight.values": torch.zeros(0),
    }
    imported = read(saved(tmp_path, tensors), base)
    own = load(base.folder).get_parameter(UP).numpy().ravel()
    wanted = np.array([2.0, 1.0], np.float32) - own[[3, 5]]
    assert_same_deltas(
        imported.delta_set.deltas, {UP: Delta.element(base.table[UP], [3, 5], wanted)}
    )
    assert imported.facts["empty_skipped"] == 1


@pytest.mark.parametrize("metadata", [{"format": "anchor_checkpoint"}, {"sparse": "False"}])
def test_an_anchor_is_told_how_to_be_imported(
    base: StoredWeights, tmp_path: Path, metadata: dict[str, str]
) -> None:
    metadata = {"format": "sparse_weight_patch", **metadata}
    whole = changed(base.folder, random_set(base, [UP]).deltas).state_dict()
    saved(tmp_path / "alone", whole, **metadata)
    with pytest.raises(
        AdapterFileError, match=r"as model\.safetensors, and import that"
    ) as refused:
        read(tmp_path / "alone", base)
    assert refused.value.code == "unsupported_file"
    # And what it says is so.
    beside = tmp_path / "beside"
    beside.mkdir()
    shutil.copy(tmp_path / "alone" / "step_000001.safetensors", beside / "model.safetensors")
    shutil.copy(base.folder / "config.json", beside)
    assert detect(Files.at(beside)) == "checkpoint"
    importer = importers()["checkpoint"]
    found = importer.read(Files.at(beside), base, ImportOptions()).delta_set.deltas
    assert list(found) == [UP]


@pytest.mark.parametrize("count", [0, 1])
def test_a_second_name_of_a_tied_parameter_may_be_listed(
    tied_base: TinyBase, tmp_path: Path, count: int
) -> None:
    tensors = {f"{UP}.indices": torch.tensor([5]), f"{UP}.values": torch.tensor([9.0])}
    tensors |= {"lm_head.weight.indices": torch.zeros(count, dtype=torch.int32)}
    tensors |= {"lm_head.weight.values": torch.zeros(count)}
    files = Files.at(saved(tmp_path, tensors))
    assert FORMAT.importer is not None
    if not count:
        assert FORMAT.importer.read(files, tied_base, ImportOptions()).facts["empty_skipped"] == 1
        return
    with pytest.raises(AdapterFileError, match="lm_head") as refused:
        FORMAT.importer.read(files, tied_base, ImportOptions())
    assert refused.value.code == "unsupported_module"


def test_what_replaces_a_value_by_itself_is_dropped_and_counted(
    base: StoredWeights, tmp_path: Path
) -> None:
    own = load(base.folder).get_parameter(UP).flatten()
    values = own[[7, 8, 9]].clone()
    values[1] += 1
    tensors = {f"{UP}.indices": torch.tensor([7, 8, 9]), f"{UP}.values": values}
    tensors |= {f"{DOWN}.indices": torch.tensor([0])}
    tensors |= {f"{DOWN}.values": load(base.folder).get_parameter(DOWN).flatten()[:1].clone()}
    imported = read(saved(tmp_path, tensors), base)
    assert {n: d.positions.tolist() for n, d in imported.delta_set.deltas.items()} == {UP: [8]}
    assert imported.facts["unchanged_dropped"] == 3


def test_an_empty_adapter_is_an_empty_patch(base: StoredWeights, tmp_path: Path) -> None:
    export(tmp_path, DeltaSet("", "", {}), base)
    assert_same_parameters(applied(load(base.folder), tmp_path), load(base.folder))
    assert read(tmp_path, base).delta_set.deltas == {}


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_values_are_written_in_the_dtype_that_is_asked_for(
    base: StoredWeights, tmp_path: Path, dtype: ValueDtype
) -> None:
    ours = random_set(base, [UP])
    export(tmp_path, ours, base, value_dtype=dtype)
    kind = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    theirs = applied(load(base.folder), tmp_path).get_parameter(UP)
    wanted = changed(base.folder, ours.deltas).get_parameter(UP).to(kind).float()
    touched = torch.from_numpy(ours.deltas[UP].dense() != 0)
    own = load(base.folder).get_parameter(UP)
    swallowed = wanted == own.to(kind).float()
    assert torch.equal(theirs, torch.where(touched & ~swallowed, wanted, own))


def test_the_deltas_are_rounded_where_it_is_asked_for(base: StoredWeights, tmp_path: Path) -> None:
    export(tmp_path, random_set(base, [UP]), base)
    (delta,) = read(tmp_path, base, value_dtype="F16").delta_set.deltas.values()
    assert delta.value_dtype == "F16"


def test_another_base_is_refused(base: StoredWeights, tmp_path: Path) -> None:
    ours = random_set(base, [UP])
    other = DeltaSet("sha256:" + "11" * 32, "other", ours.deltas)
    with pytest.raises(AdapterFileError) as refused:
        export(tmp_path, other, base)
    assert refused.value.code == "base_model_mismatch"


def test_the_weights_must_be_at_hand(base: StoredWeights, tmp_path: Path) -> None:
    export(tmp_path, random_set(base, [UP]), base)
    assert FORMAT.importer is not None
    assert not FORMAT.importer.uploadable
    with pytest.raises(AdapterFileError, match="not at hand"):
        FORMAT.importer.read(Files.at(tmp_path), base.names, ImportOptions())
