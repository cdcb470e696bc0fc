"""Random LoRA adapters in PEFT's layout, the same bytes for the same seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

RANK, ALPHA, B_SCALE = 8, 16, 0.02


def write_lora(directory: Path, base: Path, table: Mapping[str, tuple[int, int]], seed: int) -> int:
    """Write an adapter of rank 8, alpha 16, over all seven projections; returns its parameters.

    A is uniform in ±1/sqrt(in), as PEFT begins it; B, which PEFT begins with zeros, is normal times
    0.02, so that the adapter does something.

    Args:
        directory: made, with its parents.
        base: the base model's directory, noted in the configuration.
        table: base weight name → (out_features, in_features).
        seed: of the adapter.
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, (out_features, in_features) in table.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        bound = in_features**-0.5
        a = rng.uniform(-bound, bound, (RANK, in_features))
        b = B_SCALE * rng.standard_normal((out_features, RANK))
        tensors[f"{stem}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = b.astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-2] for name in table}),
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return sum(tensor.size for tensor in tensors.values())
