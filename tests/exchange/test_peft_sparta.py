"""Adapters of peft-sparta read as it applies them, and ours load in it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from gossamer.store.delta import Delta, DeltaSet, ValueDtype
from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import ExportOptions, Imported, ImportOptions
from gossamer.store.exchange.peft_sparta import FORMAT
from gossamer.store.exchange.registry import detect
from tests.exchange.support import (
    TinyBase,
    assert_same_deltas,
    assert_same_logits,
    changed,
    folder_of,
    load,
    logits,
    packed,
    random_set,
    shapes_only,
)
from tests.store_format.strategies import deltas as any_delta
from tests.store_format.strategies import steady

sparta: Any = importlib.import_module("peft_sparta")  # it has no types
its_loader: Any = importlib.import_module("peft_sparta.loader")
FROZEN = ["embed_tokens", "lm_head", "norm", "self_attn.q"]


def read(folder: Path, base: TinyBase, **options: Any) -> Imported:
    files = Files.at(folder)
    assert detect(files, uploadable=True) == "peft-sparta"
    assert FORMAT.importer is not None
    return FORMAT.importer.read(files, base, ImportOptions(**options))


def export(folder: Path, deltas: Mapping[str, Delta], base: TinyBase, **options: Any) -> None:
    assert FORMAT.exporter is not None
    folder.mkdir(exist_ok=True)
    given_set = DeltaSet(base.fingerprint, base.name, dict(deltas))
    done = FORMAT.exporter(given_set, base, folder, ExportOptions(**options))
    assert sorted(done.files) == sorted(path.name for path in folder.iterdir())


def trained(base: TinyBase, path: Path, frozen: list[str]) -> Any:
    """A SpaRTA model of its own with random deltas, as saved under `path`; in eval mode."""
    assert base.folder is not None
    torch.manual_seed(3)  # it draws its positions from PyTorch's own generator
    model = sparta.SpaRTA(load(base.folder), sparsity=0.95, frozen_modules=frozen)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, deltas in model.named_parameters():
            deltas.copy_(torch.randn(deltas.shape, generator=generator) * 0.05)
    path.mkdir()
    model.save(str(path), merged=False)
    model.eval()
    return model.model


@torch.no_grad()
def applied_in_float32(path: Path, base: TinyBase) -> Any:
    """What its loader reads, applied as its loader does, to the base in float32 and not bfloat16.

    The lines of the loop are those of `SpaRTAforCausalLM`, which has no argument for the dtype.
    """
    assert base.folder is not None
    model = load(base.folder)
    found = its_loader.load_sparse_deltas(str(path))
    for name, parameter in model.named_parameters():
        indices = found["indices"][name].unbind(1)
        chosen = parameter[indices].float()
        parameter[indices] = (chosen + found["deltas"][name].float()).to(parameter.dtype)
    return model


def test_a_file_of_its_own_means_what_it_makes_of_it(tiny_base: TinyBase, tmp_path: Path) -> None:
    theirs = trained(tiny_base, tmp_path / "a", FROZEN)
    imported = read(tmp_path / "a", tiny_base.names_only())
    assert tiny_base.folder is not None
    opened = packed(imported, tiny_base)
    assert_same_logits(theirs, tiny_base.folder, opened.deltas)
    assert_same_logits(
        applied_in_float32(tmp_path / "a", tiny_base), tiny_base.folder, opened.deltas
    )
    assert len(opened.deltas) == 3 * 6
    assert opened.base_fingerprint == ""
    assert opened.base_name == str(tiny_base.folder)
    assert imported.facts["empty_skipped"] == len(tiny_base.parameters) - 18
    assert imported.warnings == ()


def test_its_defaults_train_the_output_projection_which_is_refused(
    tiny_base: TinyBase, tied_base: TinyBase, tmp_path: Path
) -> None:
    trained(tiny_base, tmp_path / "own", ["embed_tokens", "mlp", "norm"])
    with pytest.raises(AdapterFileError, match=r"lm_head\.weight") as refused:
        read(tmp_path / "own", tiny_base)
    assert refused.value.code == "unsupported_module"
    # Where it is the embedding, it is frozen with it.
    theirs = trained(tied_base, tmp_path / "tied", ["embed_tokens", "mlp", "norm"])
    imported = read(tmp_path / "tied", tied_base)
    assert tied_base.folder is not None
    assert_same_logits(theirs, tied_base.folder, packed(imported, tied_base).deltas)


@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
def test_it_loads_what_is_exported(
    tiny_base: TinyBase,
    tied_base: TinyBase,
    tmp_path: Path,
    *,
    tied: bool,
    block_size: int | None,
) -> None:
    base = tied_base if tied else tiny_base
    assert base.folder is not None
    ours = random_set(base, density=0.05, block_size=block_size)
    export(tmp_path, ours.deltas, base)
    assert_same_logits(applied_in_float32(tmp_path, base), base.folder, ours.deltas)
    # Its own loader, whole: it takes the base in bfloat16, adds in float32 and rounds once.
    theirs = sparta.SpaRTAforCausalLM(str(tmp_path))
    theirs.base_model.set_attn_implementation("eager")
    rounded = changed(base.folder, ours.deltas, torch.bfloat16)
    found = dict(theirs.base_model.named_parameters())
    for name, parameter in rounded.named_parameters():
        assert torch.equal(found[name], parameter), name
    assert torch.equal(logits(theirs), logits(rounded))
    assert not torch.equal(logits(theirs), logits(load(base.folder, torch.bfloat16)))
    filled = {name: delta for name, delta in ours.deltas.items() if delta.nnz}
    assert_same_deltas(read(tmp_path, base).delta_set.deltas, filled)


def test_every_parameter_is_listed_and_the_configuration_names_the_base(
    tiny_base: TinyBase, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    export(tmp_path, {name: Delta.element((112, 64), [5, 70], [1.0, -1.0])}, tiny_base)
    tensors = load_file(tmp_path / "sparse_deltas.safetensors")
    listed = {key.partition(".")[2] for key in tensors}
    assert listed == set(tiny_base.parameters)
    assert tensors[f"indices.{name}"].tolist() == [[0, 5], [1, 6]]
    assert tensors["indices.model.norm.weight"].shape == (0, 1)
    assert {value.dtype.name for value in tensors.values()} == {"int32", "float32"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["sparta_pretrained_model"] == str(tiny_base.folder)
    assert config["model_type"] == "llama"


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_it_loads_narrow_values(tiny_base: TinyBase, tmp_path: Path, dtype: ValueDtype) -> None:
    assert tiny_base.folder is not None
    ours = random_set(tiny_base, ["model.layers.0.mlp.down_proj.weight"])
    export(tmp_path, ours.deltas, tiny_base, value_dtype=dtype)
    again = read(tmp_path, tiny_base).delta_set.deltas
    assert {delta.value_dtype for delta in again.values()} == {dtype}
    assert_same_logits(applied_in_float32(tmp_path, tiny_base), tiny_base.folder, again)


def test_an_export_needs_the_base_and_its_names(tiny_base: TinyBase, tmp_path: Path) -> None:
    ours = random_set(tiny_base, density=0.01)
    with pytest.raises(ValueError, match="not at hand"):
        export(tmp_path / "a", ours.deltas, tiny_base.names_only())
    stranger = {"model.nowhere.weight": Delta.element((2, 2), [0], [1.0])}
    with pytest.raises(AdapterFileError) as refused:
        export(tmp_path / "b", stranger, tiny_base)
    assert refused.value.code == "base_model_mismatch"
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_file_of_a_smaller_model_is_noticed(tiny_base: TinyBase, tmp_path: Path) -> None:
    trained(tiny_base, tmp_path / "a", FROZEN)
    config = tmp_path / "a" / "config.json"
    more = {"model.layers.3.x.weight": (128, 64)}
    table, parameters = {**tiny_base.table, **more}, {**tiny_base.parameters, **more}
    with_more = TinyBase("more", "", table, parameters)
    (warning,) = read(tmp_path / "a", with_more).warnings
    assert "1 linear weight " in warning
    config.write_text(config.read_text().replace('"hidden_size": 64', '"hidden_size": 48'))
    with pytest.raises(AdapterFileError, match="hidden_size 48") as refused:
        read(tmp_path / "a", tiny_base)
    assert refused.value.code == "base_model_mismatch"
    config.unlink()
    assert read(tmp_path / "a", tiny_base).delta_set.base_name == tiny_base.name


def test_values_are_rounded_on_request(tiny_base: TinyBase, tmp_path: Path) -> None:
    ours = random_set(tiny_base, ["model.layers.0.mlp.down_proj.weight"])
    export(tmp_path, ours.deltas, tiny_base)
    for delta in read(tmp_path, tiny_base, value_dtype="BF16").delta_set.deltas.values():
        assert delta.value_dtype == "BF16"
        assert np.allclose(delta.values_f32(), next(iter(ours.deltas.values())).values, rtol=4e-3)


@steady
@given(delta=any_delta(), dtype=st.sampled_from([None, "F32"]))
def test_a_round_trip_keeps_every_entry(
    tmp_path_factory: pytest.TempPathFactory, delta: Delta, dtype: ValueDtype | None
) -> None:
    name = "model.layers.0.q.weight"
    own = folder_of(tmp_path_factory.mktemp("base"), {"config.json": {"model_type": "llama"}})
    base = shapes_only({name: delta.shape}, own)
    folder = tmp_path_factory.mktemp("sparta")
    export(folder, {name: delta}, base, value_dtype=dtype)
    imported = read(folder, base)
    expected = {name: delta} if delta.nnz else {}
    assert_same_deltas(packed(imported, base).deltas, expected)
