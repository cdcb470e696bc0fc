"""A compiled mix equals the dense formula, whichever way it was compiled."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.merge import (
    BASE,
    Compiled,
    Member,
    MissingMemberError,
    Mix,
    MixError,
    canonical,
    compile_mix,
)
from gossamer.store.delta import Delta, DeltaSet, find_problem
from tests.store_format.strategies import SHAPES, deltas

WEIGHTS = [1.0, 0.5, -0.25, 0.3, 2.0]


@st.composite
def families(draw: st.DrawFn) -> tuple[Mix, dict[str, DeltaSet]]:
    """A mix of two to five members over some weights, which not every member touches."""
    method = draw(st.sampled_from(["overlap_mean", "linear"]))
    shapes = dict(zip("pqr", draw(st.permutations(SHAPES)), strict=False))
    kinds = draw(st.sampled_from([("element",), ("block",), ("element", "block")]))
    sets, members = {}, []
    for index in range(draw(st.integers(2, 5))):
        names = draw(st.lists(st.sampled_from(list(shapes)), unique=True, min_size=1))
        # Values of about 1: the tolerance is absolute, 1e-6 of float32 results of this size.
        chosen = {name: draw(deltas(shapes[name], kinds, magnitude=1.0)) for name in names}
        digest = f"sha256:{index}"
        sets[digest] = DeltaSet("sha256:base", "b", chosen)
        members.append(Member(digest, draw(st.sampled_from(WEIGHTS))))
    return canonical(members, method), sets


def support(delta: Delta) -> np.ndarray:
    mask = np.zeros(delta.shape[0] * delta.shape[1], bool)
    mask[delta.elements()[0]] = True
    return mask.reshape(delta.shape)


def by_formula(mix: Mix, sets: Mapping[str, DeltaSet]) -> dict[str, np.ndarray]:
    """The method over dense float64 matrices, with no thought of sparsity."""
    results: dict[str, np.ndarray] = {}
    for name in {name for one in sets.values() for name in one.deltas}:
        parts = [
            (member.weight, sets[member.digest].deltas[name])
            for member in mix.members
            if name in sets[member.digest].deltas
        ]
        total = np.zeros(parts[0][1].shape)
        for weight, delta in parts:
            total += weight * delta.dense().astype(np.float64)
        if mix.method == "overlap_mean":
            total = total / np.maximum(sum(support(delta).astype(int) for _, delta in parts), 1)
        results[name] = total
    return results


def as_served(compiled: Compiled, sets: Mapping[str, DeltaSet]) -> dict[str, np.ndarray]:
    """What the engine adds: members with weights, then the rest with weight 1, in float32."""
    parts = [(np.float32(weight), sets[digest]) for digest, weight in compiled.members]
    parts += [(np.float32(1), one) for one in (compiled.correction, compiled.replaces) if one]
    results: dict[str, np.ndarray] = {}
    for weight, one in parts:
        for name, delta in one.deltas.items():
            results[name] = results.get(name, np.zeros(delta.shape, np.float32)) + (
                weight * delta.dense()
            )
    return results


def largest_error(served: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """Over all weights, relative to the largest result or to 1."""
    worst = 0.0
    for name, expected in wanted.items():
        found = served.get(name, np.zeros(expected.shape))
        scale = max(1.0, float(np.abs(expected).max()))
        worst = max(worst, float(np.abs(found - expected).max()) / scale)
    return worst


@settings(max_examples=150, deadline=None)
@given(families(), st.sampled_from([0.0, 0.2, 1e9]))
def test_it_equals_the_dense_formula(
    family: tuple[Mix, dict[str, DeltaSet]], max_correction: float
) -> None:
    mix, sets = family
    compiled = compile_mix(mix, sets, max_correction=max_correction)
    wanted = by_formula(mix, sets)
    assert largest_error(as_served(compiled, sets), wanted) < 1e-6
    for one in (compiled.correction, compiled.replaces):
        for delta in one.deltas.values() if one else ():
            assert find_problem(delta) is None
            assert delta.value_dtype == "F32"
    if compiled.correction and max_correction == 0.2:
        assert compiled.correction.nnz <= 0.2 * sum(one.nnz for one in sets.values())
    if compiled.replaces:
        assert not compiled.members
        assert not compiled.correction


def overlapping(count: int = 3, density: float = 0.3) -> tuple[Mix, dict[str, DeltaSet]]:
    generator = np.random.default_rng(1)
    sets = {}
    for index in range(count):
        chosen = np.flatnonzero(generator.random(123 * 42) < density)
        delta = Delta.element((123, 42), chosen, generator.normal(size=chosen.size))
        sets[f"sha256:{index}"] = DeltaSet("sha256:base", "b", {"w": delta})
    return canonical([Member(digest, 0.5) for digest in sets], "overlap_mean"), sets


def test_a_corrupted_correction_is_noticed() -> None:
    mix, sets = overlapping(density=0.05)
    compiled = compile_mix(mix, sets)
    assert compiled.correction
    wanted = by_formula(mix, sets)
    assert largest_error(as_served(compiled, sets), wanted) < 1e-6
    good = compiled.correction.deltas["w"]
    moved = Delta("element", good.shape, 1, good.positions + 1, good.values, "F32")
    bad = Compiled(compiled.members, correction=DeltaSet("", "b", {"w": moved}))
    assert largest_error(as_served(bad, sets), wanted) > 1e-3
    assert largest_error(as_served(Compiled(compiled.members), sets), wanted) > 1e-3


def test_the_cheaper_form_is_chosen() -> None:
    mix, sets = overlapping(density=0.05)
    sparse = compile_mix(mix, sets)
    assert sparse.correction
    assert sparse.members == tuple((m.digest, m.weight) for m in mix.members)
    mix, sets = overlapping(density=0.8)
    dense = compile_mix(mix, sets)
    assert dense.replaces
    assert dense.members == ()
    assert dense.replaces.nnz <= 123 * 42
    assert dense.replaces.base_fingerprint == "sha256:base"
    assert dense.replaces.record == {"mix": mix.digest}


def test_the_threshold_counts_the_nonzeros_of_all_members() -> None:
    # Two members of 10 that share 4: the correction has 4 of 20 nonzeros, exactly a fifth.
    ones = np.ones(10, np.float32)
    sets = {
        "a": DeltaSet("f", "b", {"w": Delta.element((5, 8), np.arange(10), ones)}),
        "b": DeltaSet("f", "b", {"w": Delta.element((5, 8), np.arange(6, 16), ones)}),
    }
    mix = canonical([Member("a", 1), Member("b", 1)], "overlap_mean")
    assert compile_mix(mix, sets).correction
    assert compile_mix(mix, sets, max_correction=0.19).replaces


def test_members_that_never_meet_need_nothing() -> None:
    one = DeltaSet("f", "b", {"w": Delta.element((4, 4), [0, 2], [1.0, 2.0])})
    two = DeltaSet("f", "b", {"w": Delta.element((4, 4), [1, 3], [1.0, 2.0])})
    three = DeltaSet("f", "b", {"v": Delta.element((4, 4), [0], [1.0])})
    mix = canonical([Member(d, 1) for d in "abc"], "overlap_mean")
    compiled = compile_mix(mix, {"a": one, "b": two, "c": three})
    assert compiled == Compiled((("a", 1.0), ("b", 1.0), ("c", 1.0)))


def test_a_stored_zero_counts_as_present() -> None:
    one = DeltaSet("f", "b", {"w": Delta.element((1, 3), [0, 1], [4.0, 0.0])})
    two = DeltaSet("f", "b", {"w": Delta.element((1, 3), [1, 2], [2.0, 6.0])})
    mix = canonical([Member("a", 1), Member("b", 1)], "overlap_mean")
    compiled = compile_mix(mix, {"a": one, "b": two}, max_correction=0)
    assert compiled.replaces
    assert compiled.replaces.deltas["w"].dense().tolist() == [[4.0, 1.0, 6.0]]


def test_blocks_of_one_size_stay_blocks_and_others_are_taken_apart() -> None:
    tiles = np.ones((2, 4, 4), np.float32)
    block = DeltaSet("f", "b", {"w": Delta.block((6, 6), 4, [0, 3], tiles)})
    small = DeltaSet("f", "b", {"w": Delta.block((6, 6), 2, [0], np.ones((1, 2, 2)))})
    entry = DeltaSet("f", "b", {"w": Delta.element((6, 6), [7], [1.0])})
    sets = {"a": block, "b": block, "c": small, "d": entry}

    def kind_of(*digests: str) -> str:
        mix = canonical([Member(d, 1) for d in digests], "overlap_mean")
        compiled = compile_mix(mix, sets, max_correction=0)
        assert compiled.replaces
        assert (
            largest_error(as_served(compiled, sets), by_formula(mix, {d: sets[d] for d in digests}))
            < 1e-6
        )
        return compiled.replaces.deltas["w"].kind

    assert kind_of("a", "b") == "block"
    assert kind_of("a", "c") == kind_of("a", "d") == kind_of("c", "d") == "element"


def test_linear_and_base_need_no_deltas() -> None:
    assert compile_mix(BASE, {}) == Compiled(())
    mix = canonical([Member("a", 0.5), Member("b", 2)])
    assert compile_mix(mix, {}) == Compiled((("a", 0.5), ("b", 2.0)))


def test_a_member_without_deltas_is_the_callers_mistake() -> None:
    mix = canonical([Member("a", 1), Member("b", 1)], "overlap_mean")
    with pytest.raises(MissingMemberError) as missing:
        compile_mix(mix, {"a": DeltaSet("f", "b", {})})
    assert missing.value.digest == "b"


@pytest.mark.parametrize("method", ["linear", "overlap_mean"])
def test_members_share_one_base(method: str) -> None:
    def a_set(fingerprint: str, shape: tuple[int, int] = (2, 2)) -> DeltaSet:
        return DeltaSet(fingerprint, fingerprint, {"w": Delta.element(shape, [0], [1.0])})

    mix = canonical([Member("a", 1), Member("b", 1)], method)
    with pytest.raises(MixError, match="different bases: f, g") as refused:
        compile_mix(mix, {"a": a_set("f"), "b": a_set("g")})
    assert refused.value.code == "base_model_mismatch"
    with pytest.raises(MixError, match="shape of w"):
        compile_mix(mix, {"a": a_set("f"), "b": a_set("f", (2, 3))})
    # A foreign adapter without a fingerprint was checked by names and shapes when it came in.
    assert compile_mix(mix, {"a": a_set("f"), "b": a_set("")})


def test_the_same_mix_gives_the_same_bits() -> None:
    mix, sets = overlapping(5)
    first, again = compile_mix(mix, sets), compile_mix(mix, dict(reversed(sets.items())))
    assert first.replaces
    assert again.replaces
    one, two = first.replaces.deltas["w"], again.replaces.deltas["w"]
    assert one.values.tobytes() == two.values.tobytes()
    assert one.positions.tobytes() == two.positions.tobytes()
