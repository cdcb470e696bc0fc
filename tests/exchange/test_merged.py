"""A merged checkpoint is the base with the deltas added: transformers loads it, and says so."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.base.directory import check_directory
from gossamer.base.load import BaseFiles, load_model, load_tokenizer
from gossamer.base.weights import StoredWeights
from gossamer.store.delta import Delta, DeltaSet, ValueDtype
from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange import checkpoint
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Exported, ExportOptions, ImportOptions
from gossamer.store.exchange.merged import FORMAT
from tests.exchange.support import (
    FINGERPRINT,
    assert_same_logits,
    changed,
    load,
    logits,
    random_set,
)
from tests.tiny import ARCHS, save_tiny, tiny_model

TinyDir = Callable[..., Path]
DTYPES: dict[ValueDtype, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
UP = "model.layers.1.mlp.up_proj.weight"


def stored(folder: Path) -> StoredWeights:
    return StoredWeights.of(BaseFiles("tiny", folder, FINGERPRINT))


@pytest.fixture(scope="module")
def base(tiny_dir: TinyDir) -> StoredWeights:
    return stored(tiny_dir("llama"))


def export(folder: Path, ours: DeltaSet, base: StoredWeights, **options: Any) -> Exported:
    assert FORMAT.exporter is not None
    folder.mkdir(exist_ok=True)
    done = FORMAT.exporter(ours, base, folder, ExportOptions(**options))
    assert sorted(done.files) == sorted(path.name for path in folder.iterdir())
    return done


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_transformers_loads_what_we_serve(
    arch: str, tied: bool, tiny_dir: TinyDir, tmp_path: Path
) -> None:
    base = stored(tiny_dir(arch, tied=tied))
    ours = random_set(base, density=0.05)
    done = export(tmp_path, ours, base)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert theirs.dtype == torch.float32
    assert_same_logits(theirs, base.folder, ours.deltas)
    assert done.facts["nnz"] == ours.nnz
    assert done.warnings == ()
    check_directory(tmp_path)  # it is a base like any other
    load_model(BaseFiles("merged", tmp_path, ""))


def test_tiles_are_merged(base: StoredWeights, tmp_path: Path) -> None:
    ours = random_set(base, density=0.1, block_size=16)  # ragged: a side of 112 or 64 is not
    export(tmp_path, ours, base)
    assert_same_logits(load(tmp_path), base.folder, ours.deltas)


def test_the_comparison_sees_a_wrong_entry(base: StoredWeights, tmp_path: Path) -> None:
    ours = random_set(base, [UP], density=0.05)
    export(tmp_path, ours, base)
    positions, values = ours.deltas[UP].elements()
    values[3] += 0.02
    with pytest.raises(AssertionError):
        assert_same_logits(
            load(tmp_path), base.folder, {UP: Delta.element((112, 64), positions, values)}
        )


@pytest.mark.parametrize("shard_bytes", [1, 40_000, 200_000])
def test_shards_hold_what_one_file_holds(
    base: StoredWeights, tmp_path: Path, shard_bytes: int
) -> None:
    ours = random_set(base)
    export(tmp_path / "one", ours, base)
    export(tmp_path / "many", ours, base, shard_bytes=shard_bytes)
    one = load_file(tmp_path / "one" / "model.safetensors")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    parts = {path.name: load_file(path) for path in shards}
    assert {name: set(part) for name, part in parts.items()} == {
        name: {key for key, place in index["weight_map"].items() if place == name} for name in parts
    }
    many = {key: value for part in parts.values() for key, value in part.items()}
    assert many.keys() == one.keys()
    assert all(torch.equal(many[key], one[key]) for key in one)
    for part in parts.values():
        size = sum(tensor.nbytes for tensor in part.values())
        assert size <= shard_bytes or len(part) == 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert_same_logits(load(tmp_path / "many"), base.folder, ours.deltas)
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"


def test_the_checkpoint_comes_back_as_the_adapter(base: StoredWeights, tmp_path: Path) -> None:
    ours = random_set(base)
    export(tmp_path, ours, base, shard_bytes=50_000)
    assert checkpoint.FORMAT.importer is not None
    again = checkpoint.FORMAT.importer.read(Files.at(tmp_path), base, ImportOptions()).delta_set
    own, merged = load(base.folder), load(tmp_path)
    for name, delta in again.deltas.items():
        difference = merged.get_parameter(name) - own.get_parameter(name)
        assert np.array_equal(difference.numpy(), delta.dense())
        assert np.allclose(delta.dense(), ours.deltas[name].dense(), atol=1e-6)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("how", ["asked for", "the base's"])
def test_sums_are_rounded_once_and_what_that_swallows_is_said(
    dtype: ValueDtype, how: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    if how == "the base's":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
    base = stored(save_tiny(model, tmp_path / "base"))
    ours = random_set(base, density=0.2, sigma=2e-4)
    done = export(
        tmp_path / "merged", ours, base, value_dtype=dtype if how == "asked for" else None
    )
    found = load_file(tmp_path / "merged" / "model.safetensors")
    own = dict(load(base.folder, torch.float32).named_parameters())
    lost, worst = 0, (0.0, "")
    for name, delta in ours.deltas.items():
        sums = (own[name] + torch.from_numpy(delta.dense())).to(DTYPES[dtype])
        assert torch.equal(found[name], sums), name
        touched = torch.from_numpy(delta.dense()) != 0
        same = int(((sums == own[name].to(DTYPES[dtype])) & touched).sum())
        lost += same
        worst = max(worst, (same / int(touched.sum()), name))
    assert all(tensor.dtype == DTYPES[dtype] for tensor in found.values())
    share = lost / ours.nnz
    assert 0.05 < share < 0.95
    assert done.facts["absorbed"] == pytest.approx(share)
    assert done.facts["absorbed_most"] == {"weight": worst[1], "share": pytest.approx(worst[0])}
    assert done.warnings[0].startswith(f"{share:.1%} of the differences are lost")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == str(DTYPES[dtype]).removeprefix("torch.")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    ).eval()
    assert theirs.dtype == DTYPES[dtype]
    wanted = changed(base.folder, ours.deltas)
    for parameter in wanted.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    assert torch.equal(logits(theirs), logits(wanted))


def test_the_tokenizer_and_what_else_makes_a_model_come_along(tmp_path: Path) -> None:
    folder = save_tiny(tiny_model("llama"), tmp_path / "base")
    (folder / "LICENSE").write_text("as you like")
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "notes").mkdir()
    base = stored(folder)
    done = export(tmp_path / "merged", random_set(base), base)
    assert {"LICENSE", "generation_config.json", "tokenizer.json"} < set(done.files)
    assert "optimizer.pt" not in done.files
    ours = load_tokenizer(BaseFiles("merged", tmp_path / "merged", ""))
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)


def test_what_is_no_float_stays_as_it_is(tmp_path: Path) -> None:
    folder = save_tiny(tiny_model("llama"), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    extra = {
        "counts": torch.arange(5),
        "wide": torch.tensor([1.0000000001], dtype=torch.float64),
        "mask": torch.tensor([True, False]),
        "eight": torch.tensor([1.5]).to(torch.float8_e4m3fn),
    }
    save_file({**tensors, **extra}, folder / "model.safetensors", {"format": "pt"})
    base = stored(folder)
    export(tmp_path / "merged", random_set(base), base, value_dtype="BF16")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in extra.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_an_empty_adapter_is_the_base(base: StoredWeights, tmp_path: Path) -> None:
    done = export(tmp_path, DeltaSet("", "", {}), base)
    own = load_file(base.folder / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert own.keys() == found.keys()
    assert all(torch.equal(own[name], found[name]) for name in own)
    assert done.facts["absorbed"] == 0.0


def test_another_base_is_refused(base: StoredWeights, tmp_path: Path) -> None:
    ours = random_set(base, [UP])
    for wrong in (
        replace(ours, base_fingerprint="sha256:" + "11" * 32),
        DeltaSet("", "", {UP: Delta.element((112, 65), [0], [1.0])}),
        DeltaSet("", "", {"nowhere.weight": Delta.element((2, 2), [0], [1.0])}),
    ):
        with pytest.raises(AdapterFileError) as refused:
            export(tmp_path, wrong, base)
        assert refused.value.code == "base_model_mismatch"
    export(tmp_path, replace(ours, base_fingerprint=""), base)


def test_a_sum_that_is_not_finite_is_refused(base: StoredWeights, tmp_path: Path) -> None:
    ours = DeltaSet("", "", {UP: Delta.element((112, 64), [0, 7], [1.0, 65504.0])})
    folder = save_tiny(tiny_model("llama"), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors[UP].view(-1)[7] = 60000.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterFileError, match=r"60000 \+ 65504 is not finite in F16") as refused:
        export(tmp_path / "merged", ours, stored(folder), value_dtype="F16")
    assert (refused.value.tensor, refused.value.position) == (UP, 1)


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_weight_of_the_base_that_becomes_infinite_is_refused(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tiny_model("llama"), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] = -70000.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ours = DeltaSet("", "", {UP: Delta.element((112, 64), [0], [1.0])})
    with pytest.raises(
        AdapterFileError, match="-70000 of the base is not finite in F16"
    ) as refused:
        export(tmp_path / "merged", ours, stored(folder), value_dtype="F16")
    assert refused.value.tensor == name
    for dtype in (None, "BF16"):
        export(tmp_path / f"{dtype}", ours, stored(folder), value_dtype=dtype)


def test_what_a_delta_brings_back_and_what_was_infinite_is_no_reason(tmp_path: Path) -> None:
    folder = save_tiny(tiny_model("llama"), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors[UP].view(-1)[7] = 70000.0
    tensors["model.norm.weight"][3] = math.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ours = DeltaSet("", "", {UP: Delta.element((112, 64), [7], [-30000.0])})
    export(tmp_path / "merged", ours, stored(folder), value_dtype="F16")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found[UP].view(-1)[7] == 40000
    assert found["model.norm.weight"][3] == math.inf


def test_the_weights_must_be_at_hand(base: StoredWeights, tmp_path: Path) -> None:
    assert FORMAT.exporter is not None
    with pytest.raises(ValueError, match="not at hand"):
        FORMAT.exporter(random_set(base), base.names, tmp_path, ExportOptions())


def test_memory_is_a_few_tensors(base: StoredWeights, tmp_path: Path) -> None:
    ours = random_set(base, density=0.01)
    largest = max(map(math.prod, base.parameters.values())) * 4
    export(tmp_path / "warm", ours, base, value_dtype="BF16")
    for dtype in (None, "BF16"):
        tracemalloc.start()
        export(tmp_path / str(dtype), ours, base, value_dtype=dtype)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * largest + 300_000  # 82 kB a tensor; the headers, parsed
        assert peak < (base.folder / "model.safetensors").stat().st_size
