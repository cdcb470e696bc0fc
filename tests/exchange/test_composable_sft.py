"""Pickles of sparse fine-tunes: those of composable-sft, and those of IBM's SpaRTA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.base.unpickle import unpickle
from gossamer.store.delta import Delta
from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange import composable_sft, sparta_pickle
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Format, Imported, ImportOptions
from gossamer.store.exchange.registry import detect, importers
from tests.exchange.support import (
    TinyBase,
    assert_same_deltas,
    assert_same_logits,
    load,
    packed,
    random_set,
)

SFT, SPARTA = composable_sft.FORMAT, sparta_pickle.FORMAT
NAMES = {"composable-sft": "pytorch_diff.bin", "sparta-pickle": "sparse_deltas.pt"}
UP = "model.layers.1.mlp.up_proj.weight"
Make = Callable[[torch.Tensor], Any]


def saved(form: Format, folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / NAMES[form.name])
    return folder


def read(form: Format, folder: Path, base: TinyBase, **options: Any) -> Imported:
    files = Files.at(folder)
    assert detect(files) == form.name
    assert form.importer is not None
    return form.importer.read(files, base, ImportOptions(unpickle=unpickle, **options))


def encoded(difference: torch.Tensor) -> dict[str, Any]:
    """As composable-sft writes it.

    Semantics: `index = sum(coordinate[d] * prod(size[:d]))`, ascending; the first index and the
    steps between them, of which the first is a number of numpy's.
    """
    sparse = difference.to_sparse().coalesce()
    multipliers = np.cumprod([1, *difference.shape[:-1]], dtype=np.int64)
    indices = multipliers @ sparse.indices().numpy()
    order = np.argsort(indices)
    indices = indices[order]
    steps = [indices[0], *(indices[1:] - indices[:-1]).tolist()] if indices.size else []
    return {"size": difference.size(), "index_steps": steps, "values": sparse.values()[order]}


def as_array(difference: torch.Tensor) -> dict[str, Any]:
    found = encoded(difference)
    return {**found, "index_steps": np.array(found["index_steps"], np.int32)}


def coalesced(difference: torch.Tensor) -> torch.Tensor:
    """As its first releases did."""
    return difference.to_sparse().coalesce()


def with_others(base: TinyBase, deltas: Mapping[str, Delta], make: Make) -> dict[str, Any]:
    """Of every parameter, most of them without a difference, as both libraries list them."""
    found = {}
    for name, shape in base.parameters.items():
        delta = deltas.get(name)
        dense = torch.zeros(shape) if delta is None else torch.from_numpy(delta.dense())
        found[name] = make(dense)
    return found


def latest(body: Mapping[str, Any]) -> dict[str, Any]:
    """As its saving does; what replaces a parameter whole is listed where there is none too."""
    return {"diffs": body, "abs": {}}


def earlier(body: Mapping[str, Any]) -> dict[str, Any]:
    """As its earlier versions did, with the head of a model that had none."""
    return {"body": body, "head": None}


@pytest.mark.parametrize("make", [encoded, as_array, coalesced])
@pytest.mark.parametrize("save", [latest, earlier])
def test_composable_sft_means_what_it_makes_of_it(
    tiny_base: TinyBase,
    tmp_path: Path,
    make: Make,
    save: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> None:
    ours = random_set(tiny_base).deltas
    saved(SFT, tmp_path, save(with_others(tiny_base, ours, make)))
    imported = read(SFT, tmp_path, tiny_base.names_only())
    theirs = load_folder(tiny_base)
    for name, delta in ours.items():  # `param += diff`
        weight = theirs.get_parameter(name)
        weight += torch.from_numpy(delta.dense()).to_sparse()
    assert tiny_base.folder is not None
    assert_same_logits(theirs, tiny_base.folder, packed(imported, tiny_base).deltas)
    assert_same_deltas(imported.delta_set.deltas, ours)
    assert imported.delta_set.base_fingerprint == ""
    assert imported.facts["empty_skipped"] == len(tiny_base.parameters) - len(ours)
    assert imported.warnings == ()


def load_folder(base: TinyBase) -> Any:
    assert base.folder is not None
    return load(base.folder)


def test_positions_run_down_the_columns(tiny_base: TinyBase, tmp_path: Path) -> None:
    # 112 rows: step 113 from 0 is row 1 of column 1, not column 49 of row 1
    body = {UP: {"size": (112, 64), "index_steps": [0, 113, 1], "values": torch.ones(3)}}
    (delta,) = read(SFT, saved(SFT, tmp_path, {"body": body}), tiny_base).delta_set.deltas.values()
    assert delta.positions.tolist() == [0, 64 + 1, 128 + 1]


@pytest.mark.parametrize("count", [0, 1])
def test_a_second_name_of_a_tied_parameter_may_be_listed(
    tied_base: TinyBase, tmp_path: Path, count: int
) -> None:
    one = {"size": (112, 64), "index_steps": [3], "values": torch.ones(1)}
    head = {"size": (320, 64), "index_steps": [5] * count, "values": torch.ones(count)}
    saved(SFT, tmp_path, {"diffs": {UP: one, "lm_head.weight": head}, "abs": {}})
    if not count:
        assert read(SFT, tmp_path, tied_base).facts["empty_skipped"] == 1
        return
    with pytest.raises(AdapterFileError, match="lm_head") as refused:
        read(SFT, tmp_path, tied_base)
    assert refused.value.code == "unsupported_module"


def test_a_position_that_is_there_twice_adds_up(tiny_base: TinyBase, tmp_path: Path) -> None:
    body = {UP: {"size": (112, 64), "index_steps": [4, 0], "values": torch.tensor([1.0, 2.0])}}
    imported = read(SFT, saved(SFT, tmp_path, {"body": body}), tiny_base)
    assert imported.delta_set.deltas[UP].values_f32().tolist() == [3.0]
    assert imported.facts["duplicates_summed"] == 1
    assert "added up" in imported.warnings[0]


def entries(deltas: Mapping[str, Delta], base: TinyBase, dtype: torch.dtype) -> dict[str, Any]:
    """As IBM's SpaRTA saves its parameters."""
    indices, values = {}, {}
    for name, dense in with_others(base, deltas, lambda tensor: tensor).items():
        indices[name] = dense.nonzero().to(torch.int32)  # stored turned: its strides are (1, nnz)
        values[name] = torch.nn.Parameter(dense[dense != 0].to(dtype))
    return {"indices": indices, "deltas": values}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparta_of_ibm_means_what_it_makes_of_it(
    tiny_base: TinyBase, tmp_path: Path, dtype: torch.dtype
) -> None:
    content = entries(random_set(tiny_base).deltas, tiny_base, dtype)
    imported = read(SPARTA, saved(SPARTA, tmp_path, content), tiny_base.names_only())
    theirs = load_folder(tiny_base)
    for name, parameter in theirs.named_parameters():  # as its loader does
        parameter[content["indices"][name].unbind(1)] += content["deltas"][name].detach().float()
    assert tiny_base.folder is not None
    assert_same_logits(theirs, tiny_base.folder, packed(imported, tiny_base).deltas)
    wanted = "F32" if dtype == torch.float32 else "BF16"
    assert {delta.value_dtype for delta in imported.delta_set.deltas.values()} == {wanted}


def test_a_head_beside_the_deltas_is_refused(tiny_base: TinyBase, tmp_path: Path) -> None:
    saved(SPARTA, tmp_path, entries(random_set(tiny_base).deltas, tiny_base, torch.float32))
    torch.save(torch.ones(2, 64), tmp_path / "head_init.pt")
    with pytest.raises(AdapterFileError) as refused:
        read(SPARTA, tmp_path, tiny_base)
    assert (refused.value.code, refused.value.tensor) == ("unsupported_module", "head_init.pt")


@pytest.mark.parametrize("form", [SFT, SPARTA], ids=lambda form: form.name)
def test_values_are_rounded_where_it_is_asked_for(
    tiny_base: TinyBase, tmp_path: Path, form: Format
) -> None:
    ours = random_set(tiny_base, [UP]).deltas
    body = {"body": with_others(tiny_base, ours, encoded)}
    content = body if form is SFT else entries(ours, tiny_base, torch.float32)
    imported = read(form, saved(form, tmp_path, content), tiny_base, value_dtype="F16")
    assert imported.delta_set.deltas[UP].value_dtype == "F16"


@pytest.mark.parametrize("form", [SFT, SPARTA], ids=lambda form: form.name)
def test_pickles_are_opened_on_ones_own_machine_only(
    tiny_base: TinyBase, tmp_path: Path, form: Format
) -> None:
    saved(form, tmp_path, {"body": {}})
    assert form.importer is not None
    assert form.name not in importers(uploadable=True)
    with pytest.raises(AdapterFileError, match="gossamer adapters import") as refused:
        form.importer.read(Files.at(tmp_path), tiny_base, ImportOptions())
    assert refused.value.code == "unsupported_file"


def test_values_in_float64_are_rounded(tiny_base: TinyBase, tmp_path: Path) -> None:
    body = {UP: {"size": (112, 64), "index_steps": [4], "values": torch.tensor([0.1]).double()}}
    (delta,) = read(SFT, saved(SFT, tmp_path, {"body": body}), tiny_base).delta_set.deltas.values()
    assert delta.values_f32().tolist() == [np.float32(0.1)]
