"""Adapters of Alan Ansell's SFT, laid out as its saving does; the fork itself cannot be installed.

It needs bitsandbytes, a CUDA extension of its own and a PEFT of 2023.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Imported, ImportOptions
from gossamer.store.exchange.peft_sft import FORMAT
from gossamer.store.exchange.registry import detect
from tests.exchange.support import (
    TinyBase,
    assert_same_deltas,
    assert_same_logits,
    folder_of,
    load,
    packed,
    tensor_file,
)

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]


def read(folder: Path, base: TinyBase, **options: Any) -> Imported:
    files = Files.at(folder)
    assert detect(files, uploadable=True) == "peft-sft"
    assert FORMAT.importer is not None
    return FORMAT.importer.read(files, base, ImportOptions(**options))


def tensors_of(
    base: TinyBase, count: int = 200, inside: str = "", dtype: str = "<i4"
) -> dict[str, NDArray[Any]]:
    """Each module's `SparseDelta`: a parameter `values` and a buffer `indices`, unsorted."""
    generator = np.random.default_rng(4)
    found: dict[str, NDArray[Any]] = {}
    for module in MODULES:
        rows, columns = base.table[f"{module}.weight"]
        prefix = f"base_model.model.{module}.sft_delta{inside}"
        where = generator.permutation(rows * columns)[:count]
        assert (np.diff(where) < 0).any()
        found[f"{prefix}.values"] = generator.normal(0, 0.3, count).astype("<f4")
        found[f"{prefix}.indices"] = where.astype(dtype)
    return found


def saved(path: Path, tensors: dict[str, NDArray[Any]], **config: Any) -> Path:
    settings = {
        "peft_type": "SFT",
        "base_model_name_or_path": "someone/tiny",
        "density": 0.01,
        "num_deltas": {
            key.removeprefix("base_model.model.").partition(".sft_delta")[0]: value.size
            for key, value in tensors.items()
            if key.endswith("values")
        },
        "selection_algorithm": "rigl",
        "modules_to_save": None,
        **config,
    }
    files: dict[str, Any] = {
        "adapter_config.json": settings,
        "adapter_model.safetensors": tensor_file(tensors),
    }
    return folder_of(path, files)


@torch.no_grad()
def scattered(base: TinyBase, tensors: dict[str, NDArray[Any]]) -> Any:
    """The model as the fork computes it: `weight.view(-1).scatter_add_(0, indices, values)`."""
    assert base.folder is not None
    model = load(base.folder)
    for module in MODULES:
        prefix = f"base_model.model.{module}.sft_delta"
        indices = torch.from_numpy(tensors[f"{prefix}.indices"]).long()
        values = torch.from_numpy(tensors[f"{prefix}.values"])
        model.get_parameter(f"{module}.weight").view(-1).scatter_add_(0, indices, values)
    return model


def test_its_layout_means_what_the_fork_makes_of_it(tiny_base: TinyBase, tmp_path: Path) -> None:
    tensors = tensors_of(tiny_base)
    imported = read(saved(tmp_path, tensors), tiny_base.names_only())
    assert tiny_base.folder is not None
    theirs = scattered(tiny_base, tensors)
    assert_same_logits(theirs, tiny_base.folder, packed(imported, tiny_base).deltas)
    assert imported.delta_set.base_name == "someone/tiny"
    assert imported.delta_set.base_fingerprint == ""
    assert imported.delta_set.record["imported"] == {
        "format": "peft-sft",
        "density": 0.01,
        "selection_algorithm": "rigl",
    }
    assert imported.facts == {"nnz": 400, "duplicates_summed": 0}


def test_positions_may_be_wider_and_the_adapters_name_inside(
    tiny_base: TinyBase, tmp_path: Path
) -> None:
    plain = read(saved(tmp_path / "plain", tensors_of(tiny_base)), tiny_base)
    for inside, dtype in (("", "<i8"), (".default", "<i4"), (".my adapter", "<i8")):
        path = saved(tmp_path / f"x{inside}{dtype[1:]}", tensors_of(tiny_base, 200, inside, dtype))
        found = read(path, tiny_base)
        assert_same_deltas(found.delta_set.deltas, plain.delta_set.deltas)


def test_what_is_there_twice_is_added_up_as_in_the_fork(
    tiny_base: TinyBase, tmp_path: Path
) -> None:
    tensors = tensors_of(tiny_base)
    for key, value in tensors.items():
        if key.endswith("indices"):
            value[[4, 7]] = value[0]
    imported = read(saved(tmp_path, tensors), tiny_base)
    assert imported.facts == {"nnz": 396, "duplicates_summed": 4}
    assert tiny_base.folder is not None
    theirs = scattered(tiny_base, tensors)
    assert_same_logits(theirs, tiny_base.folder, packed(imported, tiny_base).deltas)


def test_the_configuration_and_the_tensors_agree(tiny_base: TinyBase, tmp_path: Path) -> None:
    tensors = tensors_of(tiny_base)
    assert read(saved(tmp_path / "none", tensors, num_deltas=None), tiny_base).facts["nnz"] == 400
    right = dict.fromkeys(MODULES, 200)
    for label, wrong, named in (
        ("other", right | {MODULES[0]: 199}, MODULES[0]),
        ("more", right | {"model.layers.1.self_attn.q_proj": 5}, "layers.1.self_attn"),
        ("less", {MODULES[0]: 200}, MODULES[1]),
        ("list", [200, 200], "num_deltas"),
    ):
        with pytest.raises(AdapterFileError, match=named) as refused:
            read(saved(tmp_path / label, tensors, num_deltas=wrong), tiny_base)
        assert refused.value.code == "invalid_adapter_file"


def test_two_adapters_in_one_file_are_refused(tiny_base: TinyBase, tmp_path: Path) -> None:
    both = tensors_of(tiny_base, inside=".one") | tensors_of(tiny_base, inside=".two")
    with pytest.raises(AdapterFileError, match="there twice"):
        read(saved(tmp_path, both), tiny_base)
