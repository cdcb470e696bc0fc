"""From foreign files to the packed file, and what an upload may ask for."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

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
ITEM_BYTES = 24


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


def test_what_it_takes_to_convert_is_bounded_by_its_headers(tmp_path: Path) -> None:
    files, file, most = shira(tmp_path), io.BytesIO(), ITEM_BYTES * ITEMS
    pack_upload(files, BASE, file, Limits(max_decoded_bytes=most))
    with pytest.raises(AdapterFileError, match=f"{most} bytes of memory") as refused:
        pack_upload(files, BASE, io.BytesIO(), Limits(max_decoded_bytes=most - 1))
    assert refused.value.code == "adapter_too_large"


SIDE, RANK = 500, 200
COUNT = RANK * 2 * SIDE


def large(form: str, where: NDArray[Any], values: NDArray[Any]) -> dict[str, Any]:
    """An adapter of one weight of `SIDE` by `SIDE`, with `COUNT` entries in any order."""
    module = f"base_model.model.{NAME.removesuffix('.weight')}"
    places = np.stack(np.divmod(where, SIDE)).astype("<i4")
    if form == "peft-sparta":
        pair = {f"indices.{NAME}": places.T.copy(), f"deltas.{NAME}": values}
        return {"sparse_deltas.safetensors": tensor_file(pair)}
    if form == "peft-shira":
        pair = {f"{module}.shira_indices": places, f"{module}.shira_weight": values}
    else:
        pair = {f"{module}.sft_delta.indices": where, f"{module}.sft_delta.values": values}
    method = form.removeprefix("peft-").upper()
    return {CONFIG: {"peft_type": method, "r": RANK}, WEIGHTS: tensor_file(pair)}


@pytest.mark.parametrize("form", importers(uploadable=True))
@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
@pytest.mark.parametrize("kind", ["in order", "in no order", "one twice", "half of them twice"])
def test_it_takes_no_more_than_that(form: str, dtype: str, kind: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    where = generator.permutation(SIDE * SIDE)[:COUNT]
    if kind == "in order":
        where.sort()
    twice = {"one twice": 1, "half of them twice": COUNT // 2}.get(kind, 0)
    if form != "peft-sparta":  # there it is refused
        where[COUNT - twice :] = where[:twice]
    values = generator.normal(0, 0.1, COUNT).astype(dtype)
    files = Files.at(folder_of(tmp_path / "files", large(form, where.astype("<i4"), values)))
    items = COUNT * (2 if form == "peft-sft" else 3)
    base = shapes_only({NAME: (SIDE, SIDE)})
    with (tmp_path / "packed").open("w+b") as file:
        tracemalloc.start()
        assert pack_upload(files, base, file, Limits()).format == form
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert 0.4 * ITEM_BYTES * items < peak <= ITEM_BYTES * items


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
