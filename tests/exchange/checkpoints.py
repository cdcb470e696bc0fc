"""Fine-tuned checkpoints for the tests: made, changed, read, and compared by numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from gossamer.base.weights import StoredWeights
from gossamer.store.delta import Delta
from gossamer.store.exchange.checkpoint import FORMAT
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Imported, ImportOptions
from gossamer.store.exchange.registry import detect
from tests.exchange.support import load, random_set

TinyDir = Callable[..., Path]
TensorMap = dict[str, torch.Tensor]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def read(folder: Path, base: StoredWeights, **options: Any) -> Imported:
    files = Files.at(folder)
    assert detect(files) == "checkpoint"
    assert FORMAT.importer is not None
    return FORMAT.importer.read(files, base, ImportOptions(**options))


def tuned(base: StoredWeights, density: float = 0.1, sigma: float = 0.05) -> PreTrainedModel:
    """The base with random differences in two layers' weights."""
    model = load(base.folder)
    names = [name for name in base.table if ".layers.1." in name or ".layers.2." in name]
    for name, delta in random_set(base, names, density=density, sigma=sigma).deltas.items():
        weight = model.get_parameter(name)
        weight.copy_(weight + torch.from_numpy(delta.dense()))
    return model


def as_stored(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def expected(model: PreTrainedModel, base: StoredWeights) -> dict[str, Delta]:
    """By numpy: all of v - W0, where it is not zero."""
    own = load(base.folder)
    found = {}
    for name in base.table:
        difference = (model.get_parameter(name) - own.get_parameter(name)).numpy()
        if difference.any():
            found[name] = Delta.from_dense(difference)
    return found


def change(folder: Path, edit: Callable[[TensorMap], Any]) -> Path:
    """Edit the tensors of a folder."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def configure(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    return folder
