"""Adapters of PEFT's SHiRA read as PEFT applies them, and ours load in PEFT."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.numpy import load_file

from gossamer.store.delta import Delta, DeltaSet, ValueDtype
from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import ExportOptions, Imported, ImportOptions
from gossamer.store.exchange.peft_shira import FORMAT
from gossamer.store.exchange.registry import detect, importers
from tests.exchange.support import (
    USES_PEFT,
    TinyBase,
    assert_same_deltas,
    assert_same_logits,
    folder_of,
    load,
    packed,
    random_set,
    shapes_only,
    tensor_file,
)
from tests.store_format.strategies import deltas as any_delta
from tests.store_format.strategies import steady

pytestmark = USES_PEFT
PREFIX = "base_model.model."
TARGETS = ["q_proj", "o_proj", "down_proj"]
ROWS, COLUMNS = SHAPE = (12, 10)
PLAIN = shapes_only({"model.layers.0.q.weight": SHAPE})


def read(folder: Path, base: TinyBase, **options: Any) -> Imported:
    files = Files.at(folder)
    assert detect(files, uploadable=True) == "peft-shira"
    assert FORMAT.importer is not None
    return FORMAT.importer.read(files, base, ImportOptions(**options))


def export(
    folder: Path, deltas: Mapping[str, Delta], base: TinyBase, **options: Any
) -> Mapping[str, Any]:
    assert FORMAT.exporter is not None
    folder.mkdir(exist_ok=True)
    given_set = DeltaSet(base.fingerprint, base.name, dict(deltas))
    done = FORMAT.exporter(given_set, base, folder, ExportOptions(**options))
    assert sorted(done.files) == sorted(path.name for path in folder.iterdir())
    return done.facts


def trained(base: TinyBase, path: Path, r: int = 2) -> Any:
    """A SHiRA model of PEFT with random values, as saved under `path`."""
    assert base.folder is not None
    config = ShiraConfig(r=r, target_modules=TARGETS, random_seed=7)
    model = get_peft_model(load(base.folder), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "shira_weight" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    model.save_pretrained(str(path))
    return model.eval()


def by_hand(
    path: Path,
    indices: NDArray[Any],
    weight: NDArray[Any] | tuple[str, list[int], bytes],
    r: int = 1,
) -> Path:
    """A file for the one weight of `PLAIN`."""
    module = f"{PREFIX}model.layers.0.q"
    tensors = {f"{module}.shira_indices": indices, f"{module}.shira_weight": weight}
    config = {"peft_type": "SHIRA", "r": r, "base_model_name_or_path": "someone/tiny"}
    return folder_of(
        path,
        {"adapter_config.json": config, "adapter_model.safetensors": tensor_file(tensors)},
    )


def test_a_file_of_peft_means_what_peft_makes_of_it(tiny_base: TinyBase, tmp_path: Path) -> None:
    theirs = trained(tiny_base, tmp_path)
    imported = read(tmp_path, tiny_base.names_only())
    assert tiny_base.folder is not None
    assert_same_logits(theirs, tiny_base.folder, packed(imported, tiny_base).deltas)
    assert len(imported.delta_set.deltas) == 3 * len(TARGETS)
    assert imported.delta_set.base_fingerprint == ""
    assert imported.delta_set.base_name == str(tiny_base.folder)
    assert imported.delta_set.record["imported"]["format"] == "peft-shira"
    assert imported.delta_set.record["imported"]["r"] == 2
    assert imported.facts["duplicates_summed"] == 0
    assert imported.warnings == ()


@pytest.mark.parametrize("block_size", [None, 8])
def test_peft_loads_what_is_exported(
    tiny_base: TinyBase, tmp_path: Path, block_size: int | None
) -> None:
    assert tiny_base.folder is not None
    ours = random_set(tiny_base, density=0.05, block_size=block_size)
    export(tmp_path, ours.deltas, tiny_base)
    theirs = PeftModel.from_pretrained(load(tiny_base.folder), tmp_path).eval()
    assert_same_logits(theirs, tiny_base.folder, ours.deltas)
    again = read(tmp_path, tiny_base)
    # A tile's zero at (0, 0) is not told from padding.
    assert_same_deltas(again.delta_set.deltas, ours.deltas)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_peft_loads_narrow_values(tiny_base: TinyBase, tmp_path: Path, dtype: ValueDtype) -> None:
    assert tiny_base.folder is not None
    ours = random_set(tiny_base, ["model.layers.0.mlp.down_proj.weight"])
    export(tmp_path, ours.deltas, tiny_base, value_dtype=dtype)
    again = read(tmp_path, tiny_base).delta_set.deltas
    assert {delta.value_dtype for delta in again.values()} == {dtype}
    theirs = PeftModel.from_pretrained(load(tiny_base.folder), tmp_path).eval()
    assert_same_logits(theirs, tiny_base.folder, again)


def test_the_comparison_sees_a_wrong_entry(tiny_base: TinyBase, tmp_path: Path) -> None:
    assert tiny_base.folder is not None
    name = "model.layers.1.self_attn.q_proj.weight"
    ours = random_set(tiny_base, [name], density=0.05)
    export(tmp_path, ours.deltas, tiny_base)
    theirs = PeftModel.from_pretrained(load(tiny_base.folder), tmp_path).eval()
    positions, values = ours.deltas[name].elements()
    values[3] += 0.01
    moved = {name: Delta.element(ours.deltas[name].shape, positions, values)}
    with pytest.raises(AssertionError):
        assert_same_logits(theirs, tiny_base.folder, moved)


def test_positions_as_floats_are_read(tiny_base: TinyBase, tmp_path: Path) -> None:
    trained(tiny_base, tmp_path / "linux")
    plain = read(tmp_path / "linux", tiny_base)
    tensors = load_file(tmp_path / "linux" / "adapter_model.safetensors")
    as_floats = {
        key: value.astype("<f4") if key.endswith("indices") else value
        for key, value in tensors.items()
    }
    config = json.loads((tmp_path / "linux" / "adapter_config.json").read_text())
    files = {"adapter_config.json": config, "adapter_model.safetensors": tensor_file(as_floats)}
    found = read(folder_of(tmp_path / "windows", files), tiny_base)
    assert_same_deltas(found.delta_set.deltas, plain.delta_set.deltas)


def test_what_is_there_twice_is_added_up_as_in_peft(tiny_base: TinyBase, tmp_path: Path) -> None:
    assert tiny_base.folder is not None
    theirs = trained(tiny_base, tmp_path / "made")
    tensors = load_file(tmp_path / "made" / "adapter_model.safetensors")
    for key, value in tensors.items():
        if key.endswith("indices"):
            value[:, 5] = value[:, 9] = value[:, 0]
    config = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    files = {"adapter_config.json": config, "adapter_model.safetensors": tensor_file(tensors)}
    path = folder_of(tmp_path / "doubled", files)
    imported = read(path, tiny_base)
    assert imported.facts["duplicates_summed"] == 2 * 3 * len(TARGETS)
    assert "18 entries" in imported.warnings[0]
    theirs = PeftModel.from_pretrained(load(tiny_base.folder), path).eval()
    assert_same_logits(theirs, tiny_base.folder, packed(imported, tiny_base).deltas)


def test_padding_goes_and_a_trained_first_entry_stays(tmp_path: Path) -> None:
    indices = np.zeros((2, 22), "<i4")
    indices[:, 1], indices[:, 2], indices[:, 20] = (3, 4), (0, 1), (2, 2)
    weight = np.zeros(22, "<f4")
    weight[0], weight[1], weight[20] = 0.5, 0.25, -0.125
    weight[5] = -0.0
    imported = read(by_hand(tmp_path, indices, weight), PLAIN)
    positions, values = packed(imported, PLAIN).deltas["model.layers.0.q.weight"].elements()
    assert positions.tolist() == [0, 1, 22, 34]
    assert values.tolist() == [0.5, 0.0, -0.125, 0.25]
    assert imported.facts["padding_dropped"] == 18
    assert imported.facts["nnz"] == 4
    assert imported.delta_set.base_name == "someone/tiny"


def test_bfloat16_values_stay_and_are_rounded_on_request(tmp_path: Path) -> None:
    indices = np.stack([np.arange(22) // COLUMNS, np.arange(22) % COLUMNS]).astype("<i4")
    bits = np.full(22, 0x3F81, "<u2")
    by_hand(tmp_path / "bf16", indices, ("BF16", [22], bits.tobytes()))
    delta = read(tmp_path / "bf16", PLAIN).delta_set.deltas["model.layers.0.q.weight"]
    assert (delta.value_dtype, delta.values[0]) == ("BF16", 0x3F81)
    by_hand(tmp_path / "f32", indices, np.full(22, 1.001953125, "<f4"))
    rounded = read(tmp_path / "f32", PLAIN, value_dtype="BF16")
    delta = rounded.delta_set.deltas["model.layers.0.q.weight"]
    assert (delta.value_dtype, delta.values[0]) == ("BF16", 0x3F80)


def test_the_rank_is_the_smallest_with_room_for_every_layer(tmp_path: Path) -> None:
    wide, tall = "model.layers.0.a.weight", "model.layers.0.b.weight"
    base = shapes_only({wide: (12, 10), tall: (30, 10)})
    for entries, rank in ((1, 1), (22, 1), (23, 2), (44, 2), (45, 3)):
        deltas = {
            wide: Delta.element((12, 10), range(entries), [1.0] * entries),
            tall: Delta.element((30, 10), range(40), [1.0] * 40),
        }
        facts = export(tmp_path / str(entries), deltas, base)
        assert facts == {"r": rank, "padding": rank * 22 - entries + rank * 40 - 40}
        again = read(tmp_path / str(entries), base)
        assert again.facts["padding_dropped"] == facts["padding"]
        assert_same_deltas(again.delta_set.deltas, deltas)


def test_what_shira_cannot_say_is_refused(tmp_path: Path) -> None:
    dense, small = "model.layers.0.a.weight", "model.layers.0.b.weight"
    base = shapes_only({dense: (12, 10), small: (4, 4)})
    full = {dense: Delta.element((12, 10), range(111), [1.0] * 111)}
    with pytest.raises(AdapterFileError, match="111 entries needs r = 6") as refused:
        export(tmp_path / "a", full, base)
    assert refused.value.tensor == dense
    # r = 3 of the one is more than the other has elements.
    both = {
        dense: Delta.element((12, 10), range(60), [1.0] * 60),
        small: Delta.element((4, 4), [0], [1.0]),
    }
    with pytest.raises(AdapterFileError, match="24 places") as refused:
        export(tmp_path / "b", both, base)
    assert refused.value.tensor == small
    with pytest.raises(AdapterFileError, match="without weights"):
        export(tmp_path / "c", {}, base)
    with pytest.raises(AdapterFileError) as refused:
        export(tmp_path / "d", {"model.nowhere.weight": full[dense]}, base)
    assert refused.value.code == "base_model_mismatch"
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    side, layers = 512, 40
    base = shapes_only({f"model.layers.{layer}.q.weight": (side, side) for layer in range(layers)})
    ours = random_set(base, density=16 * 2 / side)
    export(tmp_path, ours.deltas, base)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    tracemalloc.start()
    imported = read(tmp_path, base)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert imported.delta_set.nnz == ours.nnz
    assert left > 12 * ours.nnz  # the result
    largest = size // layers
    assert peak - left < 10 * largest < size // 2


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    folder_of(
        tmp_path,
        {"adapter_config.json": {"peft_type": "SHIRA", "r": 1}, "adapter_model.bin": b"\x80\x02"},
    )
    with pytest.raises(AdapterFileError, match="save_file") as refused:
        read(tmp_path, PLAIN)
    assert refused.value.code == "unsupported_file"


def test_only_its_own_files_are_taken_for_it(tmp_path: Path) -> None:
    assert FORMAT.importer is not None
    for name, config in (
        ("lora", {"peft_type": "LORA"}),
        ("number", {"peft_type": 3}),
        ("broken", b'{"peft_type": "SHIRA"'),
        ("list", b"[]"),
    ):
        folder = folder_of(tmp_path / name, {"adapter_config.json": config})
        assert not FORMAT.importer.detect(Files.at(folder))
    assert not FORMAT.importer.detect(Files.at(folder_of(tmp_path / "empty", {})))
    assert "peft-shira" in importers(uploadable=True)


@steady
@given(delta=any_delta(kinds=("element", "block")), dtype=st.sampled_from([None, "F32"]))
def test_a_round_trip_keeps_every_entry(
    tmp_path_factory: pytest.TempPathFactory, delta: Delta, dtype: ValueDtype | None
) -> None:
    name = "model.layers.0.q.weight"
    base = shapes_only({name: delta.shape})
    folder = tmp_path_factory.mktemp("shira")
    places = sum(delta.shape) * max(1, -(-delta.nnz // sum(delta.shape)))
    if places > delta.shape[0] * delta.shape[1]:
        with pytest.raises(AdapterFileError, match="SHiRA cannot say"):
            export(folder, {name: delta}, base, value_dtype=dtype)
        return
    export(folder, {name: delta}, base, value_dtype=dtype)
    imported = read(folder, base)
    positions, values = delta.elements()
    if positions.size and positions[0] == 0 and values[0] == 0:
        positions, values = positions[1:], values[1:]
    expected = {name: Delta.element(delta.shape, positions, values)}
    assert_same_deltas(packed(imported, base).deltas, expected)
