"""The same on a real model: PEFT's SHiRA both ways, a merged model, and the checkpoint it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model

from gossamer.base.load import BaseFiles
from gossamer.base.weights import StoredWeights
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import ExportOptions, ImportOptions
from gossamer.store.exchange.registry import exporters, importers
from tests.exchange.support import USES_PEFT, assert_same_logits, load, random_set

pytestmark = [pytest.mark.gate, USES_PEFT]
#: 576 + 1536 of them and 576 + 576: layers of two shapes, for SHiRA's one rank.
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def stored(smollm2: BaseFiles) -> StoredWeights:
    return StoredWeights.of(smollm2)


def test_peft_trains_what_is_imported(
    stored: StoredWeights, smollm2: BaseFiles, tmp_path: Path
) -> None:
    config = ShiraConfig(r=8, target_modules=["q_proj", "v_proj"], random_seed=3)
    theirs = get_peft_model(load(smollm2.path), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "shira_weight" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    theirs.save_pretrained(str(tmp_path))
    imported = importers()["peft-shira"].read(Files.at(tmp_path), stored, ImportOptions())
    assert len(imported.delta_set.deltas) == 60
    assert_same_logits(theirs.eval(), smollm2.path, imported.delta_set.deltas)


def test_peft_loads_what_is_exported(
    stored: StoredWeights, smollm2: BaseFiles, tmp_path: Path
) -> None:
    names = [name for name in stored.table if any(layer in name for layer in LAYERS)]
    ours = random_set(stored, names, density=0.005, sigma=0.02)
    exporters()["peft-shira"](ours, stored, tmp_path, ExportOptions())
    theirs = PeftModel.from_pretrained(load(smollm2.path), tmp_path).eval()
    assert_same_logits(theirs, smollm2.path, ours.deltas)


def test_transformers_loads_what_is_merged_and_it_is_read_back(
    stored: StoredWeights, smollm2: BaseFiles, tmp_path: Path
) -> None:
    ours = random_set(stored, density=0.005, sigma=0.02)
    exporters()["merged"](ours, stored, tmp_path, ExportOptions(shard_bytes=100 << 20))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_logits(load(tmp_path), smollm2.path, ours.deltas)
    back = importers()["checkpoint"].read(Files.at(tmp_path), stored, ImportOptions())
    assert_same_logits(load(tmp_path), smollm2.path, back.delta_set.deltas)
    for name, delta in back.delta_set.deltas.items():
        assert np.isin(delta.positions, ours.deltas[name].positions).all()
