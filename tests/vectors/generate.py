"""Writes the vectors of the packed file: `python -m tests.vectors.generate`.

Small files that every later version must read, with the digest each must have. They are kept as
they are; a change of the writer's bytes shows as a difference here and needs a reason.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import zstandard

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import Coding, digest, seeded_positions, write

HERE = Path(__file__).parent
SEED = 1234


def ramp(count: int) -> np.ndarray:
    """Values of both signs that every dtype holds exactly, without a random generator."""
    steps = np.arange(count)
    return ((steps * 37 % 101 - 50) / 64).astype(np.float32)


def element_set() -> DeltaSet:
    """Element deltas in the three dtypes, with a scale and an empty one."""
    shapes = {
        "layers.0.q.weight": (48, 40),
        "layers.0.v.weight": (6, 42),
        "layers.1.q.weight": (48, 40),
    }
    deltas = {
        name: Delta.element(
            shape,
            seeded_positions(SEED, name, math.prod(shape), math.prod(shape) // 20),
            ramp(math.prod(shape) // 20),
            value_dtype="BF16",
        )
        for name, shape in shapes.items()
    }
    deltas["layers.0.o.weight"] = Delta.element((9, 3), [0, 1, 26], ramp(3), value_dtype="F16")
    deltas["layers.0.up.weight"] = Delta.element((5, 7), [4, 34], ramp(2), scale=0.1)
    deltas["layers.1.v.weight"] = Delta.element((6, 42), [], [], value_dtype="BF16")
    record = {"method": "sparta", "density": 0.05, "seed": SEED, "note": "é ✓"}
    return DeltaSet("sha256:" + "5a" * 32, "tiny", deltas, record)


def block_set() -> DeltaSet:
    """Block deltas with ragged tiles, beside an element delta, without a fingerprint."""
    deltas = {
        "a.weight": Delta.block(
            (20, 30), 8, [0, 3, 11], ramp(192).reshape(3, 8, 8), value_dtype="BF16"
        ),
        "b.weight": Delta.block((16, 16), 16, [0], ramp(256).reshape(1, 16, 16)),
        "c.weight": Delta.element((20, 30), [599], ramp(1), value_dtype="BF16"),
    }
    return DeltaSet("", "unknown", deltas)


def seeded_names(delta_set: DeltaSet) -> dict[str, int]:
    return {
        name: SEED
        for name, delta in delta_set.deltas.items()
        if delta.value_dtype == "BF16" and delta.positions.size
    }


CASES: dict[str, tuple[DeltaSet, Coding, bool]] = {
    "element-raw": (element_set(), "raw", False),
    "element-zstd": (element_set(), "zstd", False),
    "element-seed": (element_set(), "raw", True),
    "element-seed-zstd": (element_set(), "zstd", True),
    "block-raw": (block_set(), "raw", False),
    "block-zstd": (block_set(), "zstd", False),
    "empty": (DeltaSet("", "", {}), "auto", False),
}


def make(folder: Path) -> dict[str, object]:
    """Write every case into `folder`; returns what vectors.json records."""
    rows = {}
    for name, (delta_set, coding, seeded) in CASES.items():
        seeds = seeded_names(delta_set) if seeded else {}
        blob_id, size = write(delta_set, folder / f"{name}.safetensors", coding=coding, seeds=seeds)
        rows[name] = {"blob_id": blob_id, "size": size, "digest": digest(delta_set)}
    return {"zstd": list(zstandard.ZSTD_VERSION), "files": rows}


if __name__ == "__main__":
    found = make(HERE)
    (HERE / "vectors.json").write_text(json.dumps(found, indent=2) + "\n")
