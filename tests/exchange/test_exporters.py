"""What holds for every format that is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gossamer.base.load import BaseFiles
from gossamer.base.weights import StoredWeights
from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.formats import ExportOptions
from gossamer.store.exchange.registry import exporters
from tests.exchange.support import FINGERPRINT, random_set

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tiny_dir: Callable[..., Path]) -> StoredWeights:
    return StoredWeights.of(BaseFiles("tiny", tiny_dir("llama"), FINGERPRINT))


@pytest.mark.parametrize("form", exporters())
def test_an_adapter_of_another_base_is_refused(
    form: str, base: StoredWeights, tmp_path: Path
) -> None:
    ours = random_set(base, [UP])
    other = replace(ours, base_fingerprint="sha256:" + "11" * 32, base_name="another")
    with pytest.raises(AdapterFileError, match="for the base another") as refused:
        exporters()[form](other, base, tmp_path, ExportOptions())
    assert refused.value.code == "base_model_mismatch"
    assert list(tmp_path.iterdir()) == []
    for own in (FINGERPRINT, ""):
        exporters()[form](replace(ours, base_fingerprint=own), base, tmp_path, ExportOptions())


@pytest.mark.parametrize("form", exporters())
def test_a_path_of_this_machine_in_a_file_is_told(
    form: str, base: StoredWeights, tmp_path: Path
) -> None:
    done = exporters()[form](random_set(base, [UP]), base, tmp_path, ExportOptions())
    inside = [
        (file.name, key)
        for file in tmp_path.glob("*config.json")
        for key, value in json.loads(file.read_text()).items()
        if value == str(base.folder)
    ]
    told = [text for text in done.warnings if "path of the base on this machine" in text]
    assert len(told) == len(inside) == form.startswith("peft")
    for (file, key), text in zip(inside, told, strict=True):
        assert text.startswith(f"{key} in {file} ")
