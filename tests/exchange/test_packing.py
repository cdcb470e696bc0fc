"""From foreign files to the packed file, and what an upload may ask for."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.packing import pack, pack_upload, uploadable_format
from gossamer.store.exchange.registry import importers
from gossamer.store.format import Limits, open_validated
from tests.exchange.support import folder_of, shapes_only, tensor_file

NAME = "model.layers.0.q.weight"
BASE = shapes_only({NAME: (12, 10)})
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: SHiRA's: two rows of 22 positions, 22 values.
ITEMS = 3 * 22


def shira(path: Path, **more: bytes) -> Files:
    """An adapter of `BASE` with every value 1."""
    indices = np.stack([np.arange(22) // 10, np.arange(22) % 10]).astype("u1")
    module = f"base_model.model.{NAME.removesuffix('.weight')}"
    tensors = {f"{module}.shira_indices": indices, f"{module}.shira_weight": np.ones(22, "<f4")}
    config = json.dumps({"peft_type": "SHIRA", "r": 1}).encode()
    files = {CONFIG: config, WEIGHTS: tensor_file(tensors), **more}
    return Files.at(folder_of(path, files))


def test_an_upload_becomes_a_packed_file(tmp_path: Path) -> None:
    file = io.BytesIO()
    packed = pack_upload(shira(tmp_path, **{"notes.txt": b"x"}), BASE, file, Limits())
    assert packed.format == "peft-shira"
    assert packed.warnings[0] == "The files were taken as peft-shira and converted."
    assert packed.warnings[-1] == "Not read: notes.txt."
    (delta,) = open_validated(file.getvalue(), BASE.table).deltas.values()
    assert delta.nnz == 22


def test_what_it_takes_decoded_is_bounded_by_its_headers(tmp_path: Path) -> None:
    files, file = shira(tmp_path), io.BytesIO()
    pack_upload(files, BASE, file, Limits(max_decoded_bytes=8 * ITEMS))
    with pytest.raises(AdapterFileError, match=f"{8 * ITEMS} bytes decoded") as refused:
        pack_upload(files, BASE, io.BytesIO(), Limits(max_decoded_bytes=8 * ITEMS - 1))
    assert refused.value.code == "adapter_too_large"


def test_a_warning_is_a_sentence(tmp_path: Path) -> None:
    files = shira(tmp_path)
    module = f"base_model.model.{NAME.removesuffix('.weight')}"
    twice = {
        f"{module}.shira_indices": np.full((2, 22), 3, "<i4"),
        f"{module}.shira_weight": np.ones(22, "<f4"),
    }
    (tmp_path / WEIGHTS).write_bytes(tensor_file(twice))
    warnings = pack_upload(files, BASE, io.BytesIO(), Limits()).warnings
    assert len(warnings) == 2
    assert all(text[0].isupper() or text[0].isdigit() for text in warnings)
    assert all(text.endswith(".") and not text.endswith("..") for text in warnings)


def test_formats_for_a_command_are_named(tmp_path: Path) -> None:
    assert uploadable_format(shira(tmp_path)) == "peft-shira"
    pickle = Files.at(folder_of(tmp_path / "pickle", {"sparse_deltas.pt": b"\x80\x02."}))
    with pytest.raises(AdapterFileError, match=r"sparta-pickle.*gossamer adapters import"):
        uploadable_format(pickle)
    unknown = Files.at(folder_of(tmp_path / "unknown", {"a.txt": b"x"}))
    with pytest.raises(AdapterFileError, match=r"a\.txt.*peft-shira") as refused:
        uploadable_format(unknown)
    assert refused.value.code == "unsupported_file"


def test_an_uploadable_format_says_what_it_reads() -> None:
    for name, importer in importers(uploadable=True).items():
        assert any(file.endswith(".safetensors") for file in importer.reads), name
        assert not any(file.endswith((".pt", ".bin")) for file in importer.reads), name


def test_what_no_packed_file_can_hold_is_refused_as_a_file() -> None:
    delta = Delta.element((12, 10), [1], [1.0])
    long = {"imported": {"note": "x" * (1 << 20)}}
    deep: dict[str, Any] = {}
    for _ in range(3000):
        deep = {"a": deep}
    for record in (long, deep):
        with pytest.raises(AdapterFileError) as refused:
            pack(DeltaSet("", "base", {NAME: delta}, record), io.BytesIO())
        assert refused.value.code == "invalid_adapter_file"
