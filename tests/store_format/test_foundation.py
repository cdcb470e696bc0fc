"""What the format needs: numpy, and zstandard only where something is compressed."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import write

_PROBE = """
import sys

class Refuse:
    blocked = {"zstandard", "safetensors", "torch", "sqlalchemy", "obstore", "numba", "pydantic"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ImportError(f"{name} must not be needed")
        return None

sys.meta_path.insert(0, Refuse())
from gossamer.store.format import digest, read
print(digest(read(sys.stdin.buffer.read())))
"""


def a_set() -> DeltaSet:
    generator = np.random.default_rng(2)
    tiles = generator.normal(size=(2, 4, 4))
    return DeltaSet(
        "sha256:00",
        "b",
        {
            "e.weight": Delta.element((9, 9), [3, 80], [1.0, -2.5], value_dtype="BF16"),
            "t.weight": Delta.block((9, 9), 4, [0, 8], tiles, value_dtype="F32"),
        },
    )


def written(coding) -> bytes:
    buffer = io.BytesIO()
    write(a_set(), buffer, coding=coding)
    return buffer.getvalue()


def probe(data: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", _PROBE], input=data, capture_output=True)


def test_a_raw_file_is_read_with_numpy_alone() -> None:
    from gossamer.store.format import digest

    done = probe(written("raw"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip() == digest(a_set())
    # The probe does block: a compressed file needs zstandard.
    assert b"zstandard must not be needed" in probe(written("zstd")).stderr


def test_the_safetensors_library_opens_every_coding(tmp_path) -> None:
    for coding in ("raw", "zstd"):
        path = tmp_path / f"{coding}.safetensors"
        path.write_bytes(written(coding))
        with safetensors.safe_open(path, "np") as file:
            assert file.metadata()["gossamer.format"] == "1"
        tensors = safetensors.torch.load_file(path)
        assert tensors
    raw = safetensors.torch.load_file(tmp_path / "raw.safetensors")
    assert raw["e.weight.positions"].tolist() == [3, 80]
    assert raw["e.weight.values"].tolist() == [1.0, -2.5]
    assert raw["t.weight.values"].shape == (2, 4, 4)
    assert np.array_equal(raw["t.weight.values"].numpy(), a_set().deltas["t.weight"].values)
