"""Adapters of PEFT's Supertuning read as PEFT applies them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel, SupertuningConfig, get_peft_model
from safetensors.numpy import load_file

from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Imported, ImportOptions
from gossamer.store.exchange.peft_supertuning import FORMAT
from gossamer.store.exchange.registry import detect, importers
from gossamer.store.values import ValueDtype, bf16_from_f32
from tests.exchange.support import (
    USES_PEFT,
    TinyBase,
    assert_same_deltas,
    assert_same_logits,
    folder_of,
    load,
    packed,
    shapes_only,
    tensor_file,
)

pytestmark = USES_PEFT
TARGETS = ["k_proj", "v_proj", "up_proj"]
NAME = "model.layers.0.q.weight"
MODULE = "base_model.model.model.layers.0.q"


def read(folder: Path, base: Any, **options: Any) -> Imported:
    files = Files.at(folder)
    assert detect(files) == "peft-supertuning"
    assert FORMAT.importer is not None
    return FORMAT.importer.read(files, base, ImportOptions(**options))


def trained(base: TinyBase, path: Path, **settings: Any) -> Any:
    """A Supertuning model of PEFT with random values, as saved under `path`."""
    assert base.folder is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it finds the positions again
        config = SupertuningConfig(target_modules=TARGETS, **{"sparsity": 0.95, **settings})
        model = get_peft_model(load(base.folder), config)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, values in model.named_parameters():
                if "supertuning_" in name:
                    values.copy_(torch.randn(values.shape, generator=generator) * 0.05)
        model.save_pretrained(str(path))
    return model.eval()


@pytest.mark.parametrize("select_top", [True, False])
def test_a_file_of_peft_means_what_peft_makes_of_it(
    tiny_base: TinyBase, tmp_path: Path, *, select_top: bool
) -> None:
    theirs = trained(tiny_base, tmp_path, select_top=select_top)
    imported = read(tmp_path, tiny_base.names_only())
    assert tiny_base.folder is not None
    assert_same_logits(theirs, tiny_base.folder, packed(imported, tiny_base).deltas)
    assert len(imported.delta_set.deltas) == 3 * len(TARGETS)
    assert imported.delta_set.base_fingerprint == ""
    assert imported.facts["positions_from_base"] is False
    assert imported.delta_set.record["imported"]["sparsity"] == 0.95


@pytest.mark.parametrize("select_top", [True, False])
def test_positions_that_were_left_out_are_found_in_the_base(
    tiny_base: TinyBase, tmp_path: Path, *, select_top: bool
) -> None:
    theirs = trained(
        tiny_base, tmp_path / "short", select_top=select_top, save_precomputed_indices=False
    )
    names = load_file(tmp_path / "short" / "adapter_model.safetensors")
    assert all(name.endswith("supertuning_values") for name in names)
    imported = read(tmp_path / "short", tiny_base)
    assert imported.facts["positions_from_base"] is True
    assert imported.delta_set.base_fingerprint == tiny_base.fingerprint
    assert tiny_base.folder is not None
    assert_same_logits(theirs, tiny_base.folder, packed(imported, tiny_base).deltas)
    trained(tiny_base, tmp_path / "long", select_top=select_top)
    whole = read(tmp_path / "long", tiny_base)
    assert_same_deltas(imported.delta_set.deltas, whole.delta_set.deltas)


def test_without_positions_the_weights_must_be_at_hand(tiny_base: TinyBase, tmp_path: Path) -> None:
    trained(tiny_base, tmp_path, save_precomputed_indices=False)
    with pytest.raises(AdapterFileError) as refused:
        read(tmp_path, tiny_base.names_only())
    assert refused.value.code == "unsupported_module"
    assert "peft-supertuning" not in importers(uploadable=True)


class OneWeight(TinyBase):
    """A base of one weight that a test fills."""

    weight: tuple[NDArray[Any], ValueDtype]

    def read(self, name: str) -> tuple[NDArray[Any], ValueDtype]:
        assert name == NAME
        return self.weight


def one_weight(weight: NDArray[np.float32], dtype: ValueDtype = "F32") -> OneWeight:
    plain = shapes_only({NAME: (weight.shape[0], weight.shape[1])})
    base = OneWeight(plain.name, plain.fingerprint, plain.table, plain.parameters)
    carried = bf16_from_f32(weight) if dtype == "BF16" else weight
    object.__setattr__(base, "weight", (carried, dtype))
    return base


def short_file(path: Path, values: list[float], **config: Any) -> Path:
    """Values only, of a weight of 4 × 4 at a sparsity of 0.75."""
    settings = {
        "peft_type": "SUPERTUNING",
        "sparsity": 0.75,
        "select_top": True,
        "save_precomputed_indices": False,
        **config,
    }
    tensors = {f"{MODULE}.supertuning_values": np.array(values, "<f4")}
    files: Mapping[str, Any] = {
        "adapter_config.json": settings,
        "adapter_model.safetensors": tensor_file(tensors),
    }
    return folder_of(path, files)


def weight_of(*largest: float) -> NDArray[np.float32]:
    """4 × 4: small distinct numbers, and these from the end on."""
    flat = np.arange(1, 17, dtype=np.float32) / 1024
    flat[-len(largest) :] = largest
    return flat.reshape(4, 4).astype(np.float32)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_values_follow_the_order_of_magnitudes(tmp_path: Path, dtype: ValueDtype) -> None:
    base = one_weight(weight_of(-8, 1, 4, -2), dtype)
    path = short_file(tmp_path / "top", [0.1, 0.2, 0.3, 0.4])
    delta = read(path, base).delta_set.deltas[NAME]
    assert delta.positions.tolist() == [12, 13, 14, 15]
    assert delta.values_f32().tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3])
    path = short_file(tmp_path / "bottom", [0.1, 0.2, 0.3, 0.4], select_top=False)
    delta = read(path, base).delta_set.deltas[NAME]
    assert delta.positions.tolist() == [0, 1, 2, 3]
    assert delta.values_f32().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    scores = torch.from_numpy(weight_of(-8, 1, 4, -2)).abs().flatten()
    assert torch.topk(scores, 4).indices.tolist() == [12, 14, 15, 13]


def test_equal_magnitudes_at_the_cut_are_refused(tmp_path: Path) -> None:
    base = one_weight(weight_of(1, -1, 4, 2, 3))
    with pytest.raises(AdapterFileError, match="save_precomputed_indices=True") as refused:
        read(short_file(tmp_path, [1, 2, 3, 4]), base)
    assert refused.value.tensor == NAME
    assert "are chosen" in refused.value.message
    assert refused.value.code == "invalid_adapter_file"


def test_equal_magnitudes_with_different_values_are_refused(tmp_path: Path) -> None:
    base = one_weight(weight_of(8, -4, 4, 2))
    with pytest.raises(AdapterFileError, match="save_precomputed_indices=True") as refused:
        read(short_file(tmp_path / "differ", [1, 2, 3, 4]), base)
    assert "whose" in refused.value.message
    # It makes no difference which of the two is first.
    delta = read(short_file(tmp_path / "same", [1, 2, 2, 4]), base).delta_set.deltas[NAME]
    assert delta.values_f32().tolist() == [1, 2, 2, 4]
    # bfloat16 makes neighbours equal.
    close = weight_of(8, 4, 4.001, 2)
    assert (
        len(read(short_file(tmp_path / "a", [1, 2, 3, 4]), one_weight(close)).delta_set.deltas) == 1
    )
    with pytest.raises(AdapterFileError, match="whose"):
        read(short_file(tmp_path / "b", [1, 2, 3, 4]), one_weight(close, "BF16"))


def test_a_lora_beside_it_is_refused(tiny_base: TinyBase, tmp_path: Path) -> None:
    trained(tiny_base, tmp_path, r=2)
    with pytest.raises(AdapterFileError, match="LoRA") as refused:
        read(tmp_path, tiny_base)
    assert refused.value.code == "unsupported_module"
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": null'))
    with pytest.raises(AdapterFileError, match="supertuning_lora") as refused:
        read(tmp_path, tiny_base)
    assert refused.value.code == "unsupported_module"


def test_what_is_there_twice_is_added_up_as_in_peft(tiny_base: TinyBase, tmp_path: Path) -> None:
    assert tiny_base.folder is not None
    trained(tiny_base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, value in tensors.items():
        if name.endswith("indices"):
            value[1] = value[0]
    (tmp_path / "adapter_model.safetensors").write_bytes(tensor_file(tensors))
    imported = read(tmp_path, tiny_base)
    assert imported.facts["duplicates_summed"] == 3 * len(TARGETS)
    theirs = PeftModel.from_pretrained(load(tiny_base.folder), tmp_path).eval()
    assert_same_logits(theirs, tiny_base.folder, packed(imported, tiny_base).deltas)
