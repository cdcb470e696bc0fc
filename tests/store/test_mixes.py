"""Reading what names a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.store.catalog.errors import InvalidName
from gossamer.store.catalog.mixes import LONGEST, parse_terms
from gossamer.store.catalog.names import Ref

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("sql", [("sql", 1.0)]),
        (f"sql@{DIGEST}", [(f"sql@{DIGEST}", 1.0)]),
        ("sql*0.7+math*0.3", [("sql", 0.7), ("math", 0.3)]),
        (" sql * 2 + math:3 ", [("sql", 2.0), ("math:3", 1.0)]),
        ("a*1e+3+b*-.5", [("a", 1000.0), ("b", -0.5)]),
        ("a-1+a-1", [("a-1", 1.0), ("a-1", 1.0)]),
    ],
)
def test_a_mix_is_read(text: str, members: list[tuple[str, float]]) -> None:
    assert [(t.ref, t.weight) for t in parse_terms(text)] == [
        (Ref.parse(name), weight) for name, weight in members
    ]


@pytest.mark.parametrize(
    "text",
    ["", "+", "a+", "+a", "a*", "*2", "a b", "a*x", "a**2", "A", "a*1e999", "../a", "a\0", "a:0"],
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        parse_terms(text)


def test_one_that_is_too_long_is_refused_unread() -> None:
    with pytest.raises(InvalidName, match="longer"):
        parse_terms("a+" * LONGEST + "a")


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        terms = parse_terms(text)
    except InvalidName:
        return
    assert terms
