"""The kept files are read as ever, and the writer still writes those bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import zstandard

from gossamer.store.format import digest, inspect, read
from tests.store_format.strategies import same
from tests.vectors import generate

RECORDED = json.loads((generate.HERE / "vectors.json").read_text())
NAMES = sorted(RECORDED["files"])


def test_every_case_is_kept() -> None:
    assert set(NAMES) == set(generate.CASES)


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_file_says_what_it_said(name: str) -> None:
    row = RECORDED["files"][name]
    data = (generate.HERE / f"{name}.safetensors").read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (row["blob_id"], row["size"])
    expected = generate.CASES[name][0]
    opened = read(data)
    assert same(opened, expected)
    assert digest(opened) == row["digest"] == digest(expected)
    assert inspect(data).nnz == expected.nnz


def test_one_content_has_one_digest_and_many_blobs() -> None:
    rows = [RECORDED["files"][name] for name in NAMES if name.startswith("element")]
    assert len({row["digest"] for row in rows}) == 1
    assert len({row["blob_id"] for row in rows}) == len(rows) == 4


@pytest.fixture(scope="module")
def remade(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("vectors")
    return folder, generate.make(folder)


@pytest.mark.parametrize("name", NAMES)
def test_the_writer_writes_those_bytes(name: str, remade) -> None:
    if "zstd" in name and list(zstandard.ZSTD_VERSION) != RECORDED["zstd"]:
        pytest.skip("another zstandard library may choose other bytes for the same content")
    folder, made = remade
    assert made["files"][name] == RECORDED["files"][name]
    kept = (generate.HERE / f"{name}.safetensors").read_bytes()
    assert (folder / f"{name}.safetensors").read_bytes() == kept
