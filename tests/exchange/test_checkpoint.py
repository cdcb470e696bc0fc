"""A full fine-tuned checkpoint becomes what it differs from its base by: all of it, or the most."""

from __future__ import annotations

import math
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.base.load import BaseFiles
from gossamer.base.weights import StoredWeights
from gossamer.store.delta import Delta
from gossamer.store.exchange.checkpoint import FORMAT
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import ImportOptions
from tests.exchange.checkpoints import (
    DOWN,
    UP,
    WEIGHTS,
    TensorMap,
    TinyDir,
    as_stored,
    change,
    expected,
    read,
    tuned,
)
from tests.exchange.support import (
    FINGERPRINT,
    assert_same_deltas,
    assert_same_logits,
    load,
    packed,
)
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def base(tiny_dir: TinyDir) -> StoredWeights:
    return StoredWeights.of(BaseFiles("tiny", tiny_dir("llama"), FINGERPRINT))


@pytest.fixture
def copy(base: StoredWeights, tmp_path: Path) -> Path:
    """A copy of the base's folder, to be changed."""
    return Path(shutil.copytree(base.folder, tmp_path / "copy"))


def test_all_that_differs_is_taken(base: StoredWeights, tmp_path: Path) -> None:
    model = tuned(base)
    model.save_pretrained(tmp_path)
    imported = read(tmp_path, base)
    assert_same_deltas(imported.delta_set.deltas, expected(model, base))
    assert_same_logits(model, base.folder, packed(imported, base).deltas)
    assert imported.delta_set.base_fingerprint == FINGERPRINT
    assert imported.delta_set.base_name == "tiny"
    facts = imported.facts
    assert facts["nnz"] == facts["differing"] == facts["kept"] == imported.delta_set.nnz
    assert facts["norm_kept"] == facts["squares_kept"] == 1.0
    assert facts["dtypes"] == {"F32": len(base.table)}
    assert facts["elements"] == sum(math.prod(shape) for shape in base.table.values())
    record = imported.delta_set.record["imported"]
    assert (record["format"], record["model_type"]) == ("checkpoint", "llama")
    assert imported.warnings == ()


def test_shards_are_read_as_one_file_is(base: StoredWeights, tmp_path: Path) -> None:
    model = tuned(base)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / WEIGHTS).exists()
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_deltas(read(tmp_path, base).delta_set.deltas, expected(model, base))


def test_the_base_itself_differs_by_nothing(base: StoredWeights) -> None:
    imported = read(base.folder, base)
    assert imported.delta_set.deltas == {}
    assert imported.facts["nnz"] == 0
    assert "the adapter is empty" in imported.warnings[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_of_a_narrow_checkpoint_is_no_difference(
    base: StoredWeights, tmp_path: Path, dtype: torch.dtype
) -> None:
    own, model = load(base.folder), as_stored(tuned(base), dtype)
    model.save_pretrained(tmp_path)
    imported = read(tmp_path, base)
    for name in base.table:
        before, after = own.get_parameter(name), model.get_parameter(name)
        differ = (after != before.to(dtype)).numpy()
        delta = imported.delta_set.deltas.get(name)
        positions = np.array([], np.int64) if delta is None else delta.positions
        assert np.array_equal(positions, np.flatnonzero(differ))
        if delta is not None:  # what differs becomes the checkpoint's value
            sums = before.numpy().ravel()[positions] + delta.values_f32()
            wanted = after.view(-1)[torch.from_numpy(positions)]
            assert torch.equal(torch.from_numpy(sums).to(dtype), wanted)
            assert np.allclose(sums, wanted.float().numpy(), rtol=0, atol=1e-7)
    assert imported.facts["rounding_only"] > 10_000
    assert any("rounded to the checkpoint's dtype" in text for text in imported.warnings)


def test_a_wider_checkpoint_is_compared_as_it_is(tmp_path: Path) -> None:
    narrow = save_tiny(as_stored(tiny_model("llama"), torch.bfloat16), tmp_path / "narrow")
    base = StoredWeights.of(BaseFiles("narrow", narrow, FINGERPRINT))
    model = tuned(base)  # in float32
    model.save_pretrained(tmp_path / "tuned")
    imported = read(tmp_path / "tuned", base)
    assert imported.facts["rounding_only"] == 0
    assert_same_deltas(imported.delta_set.deltas, expected(model, base))


def test_float64_is_rounded_and_said(base: StoredWeights, copy: Path) -> None:
    def edit(tensors: TensorMap) -> None:
        tensors[UP] = tensors[UP].double() + 1e-3

    imported = read(change(copy, edit), base)
    assert imported.facts["dtypes"]["F64"] == 1
    assert any("float64" in text for text in imported.warnings)
    assert list(imported.delta_set.deltas) == [UP]
    assert np.allclose(imported.delta_set.deltas[UP].values_f32(), 1e-3, rtol=1e-3)


def test_signed_zeros_are_equal(base: StoredWeights, copy: Path, tmp_path: Path) -> None:
    def zero(tensors: TensorMap) -> None:
        tensors[UP][0, 0] = 0.0

    def negative(tensors: TensorMap) -> None:
        tensors[UP][0, 0] = -0.0

    other = Path(shutil.copytree(copy, tmp_path / "other"))
    own = StoredWeights.of(BaseFiles("zero", change(copy, zero), FINGERPRINT))
    assert read(change(other, negative), own).facts["nnz"] == 0


@pytest.mark.parametrize("density", [1e-9, 0.001, 0.01, 0.05, 0.5, 1.0])
def test_exactly_the_largest_are_kept(base: StoredWeights, tmp_path: Path, density: float) -> None:
    model = tuned(base, density=0.2)
    model.save_pretrained(tmp_path)
    whole = expected(model, base)
    count = max(1, round(density * sum(math.prod(shape) for shape in base.table.values())))
    assert_same_deltas(
        read(tmp_path, base, density=density).delta_set.deltas, top(whole, count, base)
    )


def top(whole: Mapping[str, Delta], count: int, base: StoredWeights) -> dict[str, Delta]:
    """By sorting everything: the largest, of equal ones the first."""
    names = [name for name in base.table if name in whole]
    values = np.concatenate([whole[name].values_f32() for name in names])
    keep = np.zeros(values.size, bool)
    keep[np.argsort(-np.abs(values), kind="stable")[:count]] = True
    found, start = {}, 0
    for name in names:
        delta = whole[name]
        mine = keep[start : start + delta.nnz]
        start += delta.nnz
        if mine.any():
            kept = delta.positions[mine], delta.values_f32()[mine]
            found[name] = Delta.element(delta.shape, *kept)
    return found


def test_what_is_kept_is_said(base: StoredWeights, tmp_path: Path) -> None:
    model = tuned(base, density=0.2)
    model.save_pretrained(tmp_path)
    imported = read(tmp_path, base, density=0.01)
    whole = expected(model, base)

    def squares(deltas: Mapping[str, Delta]) -> float:
        return sum(float((d.values_f32().astype(np.float64) ** 2).sum()) for d in deltas.values())

    share = squares(imported.delta_set.deltas) / squares(whole)
    assert 0.1 < share < 0.9
    assert imported.facts["squares_kept"] == pytest.approx(share)
    assert imported.facts["norm_kept"] == pytest.approx(math.sqrt(share))
    assert imported.facts["differing"] == sum(delta.nnz for delta in whole.values())
    assert imported.facts["kept"] == imported.delta_set.nnz
    assert f"{math.sqrt(share):.1%} of their norm" in imported.warnings[0]


def test_ties_are_kept_by_position(base: StoredWeights, copy: Path) -> None:
    def edit(tensors: TensorMap) -> None:
        for name in (UP, DOWN):
            # one power of two, so that v - W0 is the same everywhere
            where = (tensors[name].abs() < 0.25).flatten().nonzero()[:50, 0]
            tensors[name].view(-1)[where] = 8.0
            own = load(base.folder).get_parameter(name)
            own.view(-1)[where] = 0.0
            save(own, name)

    def save(own: torch.Tensor, name: str) -> None:
        changed[name] = own.clone()

    changed: TensorMap = {}
    change(copy, edit)
    own_folder = Path(shutil.copytree(base.folder, copy.parent / "own"))
    own = StoredWeights.of(
        BaseFiles("own", change(own_folder, lambda tensors: tensors.update(changed)), FINGERPRINT)
    )
    elements = sum(math.prod(shape) for shape in base.table.values())
    imported = read(copy, own, density=70 / elements)
    found = {name: delta.nnz for name, delta in imported.delta_set.deltas.items()}
    first, second = (name for name in own.table if name in (UP, DOWN))
    assert found == {first: 50, second: 20}
    every = read(copy, own).delta_set.deltas
    assert every[second].nnz == 50
    kept = imported.delta_set.deltas[second].positions
    assert np.array_equal(kept, every[second].positions[:20])


@pytest.mark.parametrize("density", [None, 0.01])
def test_memory_is_a_tensor_and_the_result(
    base: StoredWeights, tmp_path: Path, density: float | None
) -> None:
    model = tuned(base, density=0.5)
    model.save_pretrained(tmp_path)
    files, largest = Files.at(tmp_path), max(map(math.prod, base.parameters.values())) * 4
    assert FORMAT.importer is not None
    read(tmp_path, base, density=density)  # what is imported late and cached
    tracemalloc.start()
    imported = FORMAT.importer.read(files, base, ImportOptions(density=density))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    result = imported.facts["nnz"] * 12
    whole = (tmp_path / WEIGHTS).stat().st_size
    assert peak < 10 * largest + 1.2 * result + 300_000  # 82 kB a tensor; the headers, parsed
    assert peak < whole + 1.2 * result


def test_values_are_rounded_once_where_it_is_asked_for(base: StoredWeights, tmp_path: Path) -> None:
    model = tuned(base)
    model.save_pretrained(tmp_path)
    rounded = read(tmp_path, base, value_dtype="BF16").delta_set.deltas
    for name, delta in expected(model, base).items():
        assert rounded[name].value_dtype == "BF16"
        wanted = torch.from_numpy(delta.values_f32()).bfloat16().float().numpy()
        assert np.array_equal(rounded[name].values_f32(), wanted)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan])
def test_a_density_is_a_share(base: StoredWeights, density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        read(base.folder, base, density=density)
