"""Canonical mixes: what is equal has one form and one digest."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.merge import BASE, METHODS, Member, Mix, MixError, canonical
from tests.store_format.strategies import steady

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


def members(*pairs: tuple[str, float]) -> list[Member]:
    return [Member(digest, weight) for digest, weight in pairs]


def test_one_adapter_is_itself_with_weight_one() -> None:
    mix = canonical(members((A, 1)))
    assert mix == Mix((Member(A, 1.0),))
    assert not mix.is_base
    assert canonical(members((A, 0.5), (A, 0.5))) == mix
    assert canonical(members((A, 1), (B, 0))) == mix
    assert canonical(members((B, 1), (A, 1), (B, -1))) == mix


def test_nothing_left_is_the_base() -> None:
    for none in ([], members((A, 0)), members((A, 2), (A, -2)), members((A, 1e-60))):
        assert canonical(none) == BASE
        assert canonical(none, "overlap_mean") == BASE
    assert BASE.is_base
    assert BASE.digest == canonical([]).digest


@steady
@given(st.permutations([(A, 0.25), (B, -3.0), (C, 0.1), (A, 0.5)]))
def test_the_order_given_does_not_matter(pairs: list[tuple[str, float]]) -> None:
    for method in METHODS:
        mix = canonical(members(*pairs), method)
        assert mix == canonical(members((C, 0.1), (A, 0.75), (B, -3)), method)
        assert [m.digest for m in mix.members] == [A, B, C]


def test_weights_are_float32() -> None:
    (member,) = canonical(members((A, 0.1))).members
    assert member.weight == float(np.float32(0.1)) != 0.1
    assert canonical(members((A, 0.1))) == canonical(members((A, float(np.float32(0.1)))))


def test_linear_parameters_become_weights() -> None:
    double = canonical(members((A, 0.5), (B, 1)), "linear", {"lambda": 2})
    assert double == canonical(members((A, 1), (B, 2)))
    assert double.params == ()
    normal = canonical(members((A, 1), (B, 3)), "linear", {"normalize": True})
    assert normal == canonical(members((A, 0.25), (B, 0.75)))
    assert canonical(members((A, 1)), "linear", {"lambda": 0}) == BASE
    both = canonical(members((A, 2), (B, 2)), params={"normalize": True, "lambda": -1.0})
    assert both == canonical(members((A, -0.5), (B, -0.5)))


def test_a_method_of_one_member_is_linear() -> None:
    assert canonical(members((A, 0.7)), "overlap_mean") == canonical(members((A, 0.7)))
    assert canonical(members((A, 0.7), (B, 0)), "overlap_mean").method == "linear"
    assert canonical(members((A, 0.7), (B, 1)), "overlap_mean").method == "overlap_mean"


def test_different_mixes_have_different_digests() -> None:
    mixes = [
        BASE,
        canonical(members((A, 1))),
        canonical(members((B, 1))),
        canonical(members((A, 0.5))),
        canonical(members((A, -1))),
        canonical(members((A, 1), (B, 1))),
        canonical(members((A, 1), (B, 1)), "overlap_mean"),
        Mix((Member(A, 1.0),), "linear", (("x", 1),)),
    ]
    assert len({mix.digest for mix in mixes}) == len(mixes)
    assert len({*mixes}) == len(mixes)  # hashable, for caches


def test_the_digest_is_stable() -> None:
    # Caches and clients keep it: a change here changes every mix's identity.
    mix = canonical(members((B, 0.3), (A, 0.7)), "overlap_mean")
    assert BASE.digest == "sha256:1d63ffabb3d1454c6f2e4f634176e29a148f377c44ff9aa2964bfa081fae3b31"
    assert mix.digest == "sha256:8c2a98b9290dede4a02c88a5d4f22c1ab38f379bc09ee0bdd16e12fdc011fec4"


@pytest.mark.parametrize(
    ("pairs", "method", "params", "code", "field"),
    [
        ([(A, math.nan)], "linear", {}, "invalid_mix", "members[0].weight"),
        ([(A, 1.0), (B, math.inf)], "linear", {}, "invalid_mix", "members[1].weight"),
        ([(A, 16.5)], "linear", {}, "invalid_mix", "members[0].weight"),
        ([(A, -1e300)], "linear", {}, "invalid_mix", "members[0].weight"),
        ([(A, True)], "linear", {}, "invalid_mix", "members[0].weight"),
        ([(A, "1")], "linear", {}, "invalid_mix", "members[0].weight"),
        ([(A, 10.0), (A, 10.0)], "linear", {}, "invalid_mix", "members"),
        ([(A, 10.0)], "linear", {"lambda": 2}, "invalid_mix", "params"),
        ([(A, 1.0), (B, -0.99)], "linear", {"normalize": True}, "invalid_mix", "params"),
        ([(A, 1.0), (B, -1.0)], "linear", {"normalize": True}, "invalid_mix", "params.normalize"),
        ([(A, 1.0)], "linear", {"normalize": 1}, "invalid_mix", "params.normalize"),
        ([(A, 1.0)], "linear", {"lambda": math.nan}, "invalid_mix", "params.lambda"),
        ([(A, 1.0)], "linear", {"lambda": 17}, "invalid_mix", "params.lambda"),
        ([(A, 1.0)], "linear", {"lambda": "2"}, "invalid_mix", "params.lambda"),
        ([(A, 1.0)], "linear", {"lambda": False}, "invalid_mix", "params.lambda"),
        ([(A, 1.0)], "linear", {"density": 0.2}, "invalid_mix", "params.density"),
        ([(A, 1.0)], "overlap_mean", {"lambda": 2}, "invalid_mix", "params.lambda"),
        ([(A, 1.0)], "ties", {}, "unknown_merge_method", "method"),
        ([(f"{i}", 1.0) for i in range(9)], "linear", {}, "invalid_mix", "members"),
    ],
)
def test_what_cannot_be_is_refused_by_field(pairs, method, params, code, field) -> None:
    with pytest.raises(MixError) as refused:
        canonical(members(*pairs), method, params)
    assert (refused.value.code, refused.value.field) == (code, field)


def test_an_unknown_method_lists_what_exists() -> None:
    with pytest.raises(MixError, match="there are linear, overlap_mean"):
        canonical(members((A, 1.0)), "slerp")


def test_the_limits_are_arguments() -> None:
    nine = members(*[(f"{i}", 1.0) for i in range(9)])
    assert len(canonical(nine, max_members=9).members) == 9
    eight_and_a_zero = [*nine[:8], Member("z", 0.0)]
    assert len(canonical(eight_and_a_zero).members) == 8
    assert canonical(members((A, 20.0)), max_weight=32.0).members[0].weight == 20.0


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda m: m.name)
def test_every_row_of_the_registry_is_complete(method) -> None:
    assert METHODS[method.name] is method
    assert method.formula
    assert method.paper.startswith("https://")
    assert method.needs_correction == (method.combine is not None)
    assert all(parameter.about for parameter in method.parameters)
