"""Hostile adapters of other libraries are refused with the right code, and nothing else happens."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Imported, ImportOptions
from gossamer.store.exchange.registry import detect, importers
from tests.exchange import peft_attacks, sparta_attacks
from tests.exchange.peft_attacks import METHODS, NAME, SFT, SHAPE, SHIRA, SUPERTUNING, Method
from tests.exchange.support import Attack, folder_of, packed, shapes_only

BASE = shapes_only({NAME: SHAPE, "model.layers.0.v.weight": (6, 10)})
#: Format → its attacks.
CORPUS = {
    **{method.format: list(peft_attacks.attacks(method)) for method in METHODS},
    "peft-sparta": list(sparta_attacks.attacks()),
}
CORPUS[SHIRA.format] += peft_attacks.of_shira()
CORPUS[SUPERTUNING.format] += peft_attacks.of_supertuning()
CORPUS[SFT.format] += peft_attacks.of_sft()
CASES = [(form, attack) for form, corpus in CORPUS.items() for attack in corpus]
_IDS = [f"{form}: {attack}" for form, attack in CASES]


def read(form: str, folder: Path) -> Imported:
    return importers()[form].read(Files.at(folder), BASE, ImportOptions())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.format)
def test_the_untouched_file_is_accepted(method: Method, tmp_path: Path) -> None:
    # Otherwise everything below could be refused for a mistake of the corpus.
    folder = folder_of(tmp_path, method.files())
    assert detect(Files.at(folder)) == method.format
    (delta,) = packed(read(method.format, folder), BASE).deltas.values()
    assert delta.positions.tolist() == list(range(method.count))
    assert (delta.values_f32() == 1).all()


def test_the_untouched_file_of_sparta_is_accepted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, sparta_attacks.files())
    assert detect(Files.at(folder)) == "peft-sparta"
    (delta,) = packed(read("peft-sparta", folder), BASE).deltas.values()
    assert delta.positions.tolist() == list(range(sparta_attacks.COUNT))


def test_names_in_each_corpus_are_unique() -> None:
    for corpus in CORPUS.values():
        assert len({attack.name for attack in corpus}) == len(corpus) > 50


@pytest.mark.parametrize(("form", "attack"), CASES, ids=_IDS)
def test_the_attack_is_refused_with_its_code(form: str, attack: Attack, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, attack.files)
    tracemalloc.start()
    with pytest.raises(AdapterFileError) as refused:
        read(form, folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    error = refused.value
    assert error.code == attack.code, error.message
    assert attack.named in f"{error.tensor} {error.message}"
    if attack.entry is not None:
        assert error.position == attack.entry
    assert error.message.isprintable()
    assert len(error.message) < 1000
    assert peak < 2e6  # the name of 100 kB takes the most, 0.8 MB


@pytest.mark.parametrize(("form", "attack"), CASES, ids=_IDS)
def test_the_other_doors_raise_nothing_else(form: str, attack: Attack, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, attack.files)
    files = Files.at(folder)
    for importer in importers().values():
        assert importer.detect(files) in (True, False)
    for other in CORPUS.keys() - {form}:
        with pytest.raises(AdapterFileError):
            read(other, folder)


def test_a_refused_entry_is_named_as_the_file_counts_it(tmp_path: Path) -> None:
    # Sorted, and with two entries summed, the offending one is the second of the result.
    tensors: dict[str, Any] = SFT.tensors()
    where = np.arange(SFT.count, dtype="<i4")[::-1].copy()
    where[21] = where[20] = 0
    values = np.ones(SFT.count, "<f4")
    values[19] = math.nan
    tensors[SFT.key(SFT.indices)], tensors[SFT.key(SFT.values)] = where, values
    with pytest.raises(AdapterFileError, match=r"entry 19") as refused:
        read(SFT.format, folder_of(tmp_path, SFT.files(tensors)))
    assert refused.value.position == 19


def test_three_unknown_weights_are_named_and_no_more(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {}
    for layer in range(5):
        tensors |= SHIRA.tensors(f"model.layers.{layer + 7}.q.weight")
    with pytest.raises(AdapterFileError) as refused:
        read(SHIRA.format, folder_of(tmp_path, SHIRA.files(tensors)))
    named = [f"layers.{layer + 7}.q" in refused.value.message for layer in range(5)]
    assert sum(named) == 3
    assert "made for someone/else" in refused.value.message


def test_what_a_configuration_says_is_kept_small(tmp_path: Path) -> None:
    says: Mapping[str, Any] = {
        "base_model_name_or_path": "x" * 10_000,
        "mask_type": "\u202egnp",
        "random_seed": 10**400,
        "peft_version": {"a": []},
    }
    found = read(SHIRA.format, folder_of(tmp_path, SHIRA.files(**says)))
    assert len(found.delta_set.base_name) < 300
    record = found.delta_set.record["imported"]
    assert record == {"format": "peft-shira", "r": 1, "mask_type": "\\u202egnp"}
    packed(found, BASE)
