"""What a run's parameters refer to: names of a catalog, files, and mixes of both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.store.catalog.errors import RegistryBusy
from gossamer.store.catalog.opening import Store
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import digest, write
from gossamer.training.errors import AdapterError
from gossamer.training.references import CatalogAdapters, FileAdapters, opened_mix
from gossamer.training.starting import no_adapters
from tests.store.support import BASE, OTHER_BASE, make_deltas, make_file, opened


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Acme has `one` (versions 1 and 2) and `two`; beta has `hers`."""
    with opened(tmp_path / "data", ("acme", "beta")) as made:
        made.catalog.upload("acme", "one", [make_file(1)])
        made.catalog.upload("acme", "one", [make_file(11)])
        made.catalog.upload("acme", "two", [make_file(2)])
        made.catalog.upload("beta", "hers", [make_file(3)])
        yield made


def dense_sum(*weighted: tuple[DeltaSet, float]) -> dict[str, np.ndarray]:
    """Σ w·Δ the plain way."""
    return {
        name: sum(  # type: ignore[misc]
            w * one.deltas[name].dense().astype(np.float64)
            for one, w in weighted
            if name in one.deltas
        )
        for name in BASE.table
    }


def assert_is_sum(found: DeltaSet, *weighted: tuple[DeltaSet, float]) -> None:
    for name, want in dense_sum(*weighted).items():
        np.testing.assert_array_equal(found.deltas[name].dense(), want.astype(np.float32))


def test_a_name_means_what_the_catalog_says(store: Store) -> None:
    adapters = CatalogAdapters(store.catalog, "acme")
    assert digest(adapters("one")) == digest(make_deltas(11))
    assert digest(adapters("one:1")) == digest(make_deltas(1))
    assert digest(adapters(f"one@{digest(make_deltas(1))}")) == digest(make_deltas(1))


def test_a_fixed_reference_means_what_it_meant(store: Store) -> None:
    first = digest(make_deltas(1))
    adapters = CatalogAdapters(store.catalog, "acme", {"one": f"one@{first}"})
    assert digest(adapters("one")) == first
    assert_is_sum(adapters("one*2+two*0.5"), (make_deltas(1), 2.0), (make_deltas(2), 0.5))
    store.catalog.delete("acme", "one", 1)
    with pytest.raises(AdapterError) as refused:
        adapters("one")
    assert refused.value.reference == "one"
    assert "deleted since" in refused.value.problem
    assert first in refused.value.problem


def test_a_mix_is_the_weighted_sum_over_the_union(store: Store) -> None:
    adapters = CatalogAdapters(store.catalog, "acme")
    one, two = make_deltas(11), make_deltas(2)
    found = adapters("one*0.7 + two*-0.3")
    w1, w2 = float(np.float32(0.7)), float(np.float32(-0.3))
    # in the order of a served mix: by digest
    ordered = sorted([(one, w1), (two, w2)], key=lambda pair: digest(pair[0]))
    assert_is_sum(found, *ordered)
    for name, delta in found.deltas.items():
        union = np.union1d(one.deltas[name].positions, two.deltas[name].positions)
        np.testing.assert_array_equal(delta.positions, union)
        assert delta.value_dtype == "F32"
    assert found.base_fingerprint == BASE.fingerprint
    assert digest(adapters("two*-0.3+one*0.7")) == digest(found)
    damaged = found.deltas["a.weight"].values.copy()
    damaged[0] += 1
    broken = Delta.element((64, 48), found.deltas["a.weight"].positions, damaged)
    with pytest.raises(AssertionError):
        assert_is_sum(DeltaSet("", "", {**found.deltas, "a.weight": broken}), *ordered)


def test_mixes_of_one_adapter(store: Store) -> None:
    adapters = CatalogAdapters(store.catalog, "acme")
    same = digest(make_deltas(11))
    for text in ("one*1", "one*0.25+one*0.75", "one+two*0", "one:2*0.5+one*0.5"):
        assert digest(adapters(text)) == same, text
    assert_is_sum(adapters("one+one"), (make_deltas(11), 2.0))


def test_entries_that_cancel_stay_in_the_support() -> None:
    found = opened_mix("a+b*-1", {"a": make_deltas(1), "b": _negated(make_deltas(1))}.__getitem__)
    assert found.nnz == make_deltas(1).nnz
    cancelled = opened_mix("a+b", {"a": make_deltas(1), "b": _negated(make_deltas(1))}.__getitem__)
    assert cancelled.nnz == make_deltas(1).nnz
    assert all(not delta.values.any() for delta in cancelled.deltas.values())


def _negated(delta_set: DeltaSet) -> DeltaSet:
    deltas = {
        name: Delta.element(delta.shape, delta.positions, -delta.values_f32(), value_dtype="F32")
        for name, delta in delta_set.deltas.items()
    }
    return DeltaSet(delta_set.base_fingerprint, delta_set.base_name, deltas)


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([None, 8, 16]),
    st.sampled_from([None, 8]),
    st.integers(0, 99),
)
def test_tiles_of_any_size_are_summed(
    rows: int, columns: int, one_size: int | None, other_size: int | None, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shape = (rows * 3, columns * 5)
    sets = []
    for size in (one_size, other_size):
        dense = random.normal(size=shape).astype(np.float32)
        dense[random.random(shape) < 0.8] = 0.0
        delta = Delta.from_dense(dense, block_size=size)
        sets.append(DeltaSet("sha256:x", "x", {"w": delta}))
    found = opened_mix("a*0.5+b*2", dict(zip("ab", sets, strict=True)).__getitem__)
    want = 0.5 * sets[0].deltas["w"].dense() + 2.0 * sets[1].deltas["w"].dense()
    np.testing.assert_allclose(found.deltas["w"].dense(), want, rtol=1e-6, atol=1e-7)
    supports = [one.deltas["w"].elements()[0] for one in sets]
    np.testing.assert_array_equal(found.deltas["w"].positions, np.union1d(*supports))


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("three", "there is none"),
        ("one:7", "there is none"),
        ("hers", "there is none"),
        ("beta/hers", "there is none"),
        ("one+three*0.5", "there is none"),
        ("one*0", "leave nothing"),
        ("one+one*-1", "leave nothing"),
        ("one*17", "[-16, 16]"),
        ("one**2", "name*weight"),
        ("No Such", "name*weight"),
        ("ONE", "lower-case"),
    ],
)
def test_what_cannot_be_meant_is_refused(store: Store, reference: str, problem: str) -> None:
    with pytest.raises(AdapterError) as refused:
        CatalogAdapters(store.catalog, "acme")(reference)
    assert problem in refused.value.problem


def test_a_run_may_begin_with_more_members_than_a_request_may_name() -> None:
    made = {f"m{i}": make_deltas(i) for i in range(12)}
    found = opened_mix("+".join(f"{name}*0.5" for name in made), made.__getitem__)
    halves = sorted(((one, 0.5) for one in made.values()), key=lambda pair: digest(pair[0]))
    assert_is_sum(found, *halves)


def test_another_base(store: Store, tmp_path: Path) -> None:
    with (
        Store(tmp_path / "data", OTHER_BASE) as other,
        pytest.raises(AdapterError, match="and this run's is"),
    ):
        CatalogAdapters(other.catalog, "acme")("one")
    sets = {"a": make_deltas(1), "b": make_deltas(2, fingerprint=OTHER_BASE.fingerprint)}
    with pytest.raises(AdapterError, match="different bases"):
        opened_mix("a+b", sets.__getitem__)
    shapes = {
        name: DeltaSet("", "", {"w": Delta.element(shape, [0], [1.0])})
        for name, shape in (("a", (2, 2)), ("b", (3, 2)))
    }
    with pytest.raises(AdapterError, match="shape"):
        opened_mix("a+b", shapes.__getitem__)


def test_a_sum_that_no_adapter_may_hold() -> None:
    big = {
        n: DeltaSet("", "", {"w": Delta.element((2, 2), [i], [6e4])}) for i, n in enumerate("ab")
    }
    with pytest.raises(AdapterError, match="cannot be stored"):
        opened_mix("a*2+b", big.__getitem__)


def test_a_stored_adapter_without_a_fingerprint_is_for_the_base_that_it_was_checked_with(
    store: Store,
) -> None:
    store.catalog.upload("acme", "plain", [make_file(5, fingerprint="")])
    found = CatalogAdapters(store.catalog, "acme")("plain")
    assert found.base_fingerprint == BASE.fingerprint
    assert digest(found) == digest(make_deltas(5))


def test_a_damaged_adapter_is_named(store: Store, tmp_path: Path) -> None:
    blob = store.catalog.show("acme", "two").versions[0].blob_id
    (path,) = (tmp_path / "data" / "store").rglob(f"*{blob}*")
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(AdapterError, match="damaged"):
        CatalogAdapters(store.catalog, "acme")("two")


def test_a_store_that_cannot_answer_is_no_fault_of_the_reference(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> None:
        raise RegistryBusy(5.0)

    monkeypatch.setattr(store.catalog, "resolve", busy)
    with pytest.raises(RegistryBusy):
        CatalogAdapters(store.catalog, "acme")("one")


def test_files_come_before_the_catalog(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    write(make_deltas(7), file)
    adapters = FileAdapters({"one": file, "mine": file}, CatalogAdapters(store.catalog, "acme"))
    assert digest(adapters("mine")) == digest(adapters("one")) == digest(make_deltas(7))
    assert digest(adapters("one:1")) == digest(make_deltas(1)), "another reference than the file's"
    assert_is_sum(adapters("mine*0.5+two*0.5"), (make_deltas(7), 0.5), (make_deltas(2), 0.5))


def test_a_file_that_is_no_adapter(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk" * 100)
    adapters = FileAdapters({"junk": junk, "gone": tmp_path / "gone"}, no_adapters)
    with pytest.raises(AdapterError, match="no adapter file"):
        adapters("junk")
    with pytest.raises(FileNotFoundError):
        adapters("gone")
    with pytest.raises(AdapterError, match="no adapters to begin with"):
        adapters("other")
