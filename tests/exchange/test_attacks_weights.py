"""Hostile checkpoints, patches and pickles are refused with the right code, and do nothing else."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest

from gossamer.base.unpickle import unpickle
from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Imported, ImportOptions
from gossamer.store.exchange.registry import detect, importers
from tests.base import pickle_attacks
from tests.exchange import pickled_attacks, weights_attacks
from tests.exchange.support import Attack, TinyBase, folder_of, packed
from tests.exchange.weights_attacks import NAME, index, make_base, sharded

CORPUS = {**weights_attacks.attacks(), **pickled_attacks.attacks()}
GOOD = {**weights_attacks.good_files(), **pickled_attacks.good_files()}
CASES = [(form, attack) for form, corpus in CORPUS.items() for attack in corpus]
_IDS = [f"{form}: {attack}" for form, attack in CASES]
NNZ = {"checkpoint": 120, "weight-patch": 3, "composable-sft": 3, "sparta-pickle": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return make_base(tmp_path_factory.mktemp("base"))


def read(form: str, folder: Path, base: TinyBase, density: float | None = None) -> Imported:
    options = ImportOptions(unpickle=unpickle, density=density)
    return importers()[form].read(Files.at(folder), base, options)


@pytest.mark.parametrize("form", CORPUS)
def test_the_untouched_files_are_accepted(form: str, base: TinyBase, tmp_path: Path) -> None:
    # Otherwise everything below could be refused for a mistake of the corpus.
    folder = folder_of(tmp_path, GOOD[form])
    assert detect(Files.at(folder)) == form
    found = packed(read(form, folder, base), base).deltas
    assert {name: delta.nnz for name, delta in found.items()} == {NAME: NNZ[form]}


def test_the_untouched_shards_are_accepted(base: TinyBase, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, sharded(index()))
    assert detect(Files.at(folder)) == "checkpoint"
    assert read("checkpoint", folder, base).delta_set.nnz == NNZ["checkpoint"]


def test_names_in_each_corpus_are_unique() -> None:
    for corpus in CORPUS.values():
        assert len({attack.name for attack in corpus}) == len(corpus) > 30


@pytest.mark.parametrize(("form", "attack"), CASES, ids=_IDS)
def test_the_attack_is_refused_with_its_code(
    form: str, attack: Attack, base: TinyBase, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, attack.files)
    tracemalloc.start()
    with pytest.raises(AdapterFileError) as refused:
        read(form, folder, base)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    error = refused.value
    assert error.code == attack.code, error.message
    assert attack.named in f"{error.tensor} {error.message}", error.message
    if attack.entry is not None:
        assert error.position == attack.entry
    assert error.message.isprintable()
    assert len(error.message) < 1000
    assert peak < 3e6


@pytest.mark.parametrize("attack", CORPUS["checkpoint"], ids=str)
def test_a_density_changes_nothing_of_that(attack: Attack, base: TinyBase, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError) as refused:
        read("checkpoint", folder_of(tmp_path, attack.files), base, density=0.05)
    assert refused.value.code == attack.code


@pytest.mark.parametrize(("form", "attack"), CASES, ids=_IDS)
def test_the_other_doors_raise_nothing_else(
    form: str, attack: Attack, base: TinyBase, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, attack.files)
    files = Files.at(folder)
    for importer in importers().values():
        assert importer.detect(files) in (True, False)
    for other in CORPUS.keys() - {form}:
        with pytest.raises(AdapterFileError):
            read(other, folder, base)


@pytest.mark.parametrize("file", ["pytorch_diff.bin", "sparse_deltas.pt"])
def test_pickles_that_run_code_run_none(file: str, base: TinyBase, tmp_path: Path) -> None:
    form = "composable-sft" if file == "pytorch_diff.bin" else "sparta-pickle"
    refused = 0
    for attack in pickle_attacks.attacks():
        if attack.name.startswith("bomb"):
            continue
        with pytest.raises(AdapterFileError):
            read(form, folder_of(tmp_path, {file: attack.data}), base)
        refused += 1
    assert refused > 80
    assert not pickle_attacks.CANARY.exists()


def test_a_patch_of_a_gigabyte_of_gaps_is_refused_at_once(base: TinyBase, tmp_path: Path) -> None:
    """A sparse file: its header is honest, and its gaps are all zero."""
    count = 1 << 28
    header = (
        b'{"__metadata__":{"format":"sparse_weight_patch"},'
        b'"nowhere.val":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]},'
        b'"nowhere.idx":{"dtype":"U32","shape":[%d],"data_offsets":[%d,%d]}}'
    ) % (count, 4 * count, count, 4 * count, 8 * count)
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 8 * count)
    begin = time.thread_time()
    tracemalloc.start()
    with pytest.raises(AdapterFileError, match="nowhere is unknown"):
        read("weight-patch", tmp_path, base)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6
    assert time.thread_time() - begin < 1
