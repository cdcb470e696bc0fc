"""Reading `model`: what each form means, and what is no model at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.api.errors import ApiError
from gossamer.api.model_string import parse_model
from gossamer.store.catalog.mixes import LONGEST

DIGEST = "sha256:" + "ab" * 32
NAMES = ("base", "smollm2-135m")


def terms(text: str) -> list[tuple[str, float]]:
    return [(t.ref.given, t.weight) for t in parse_model(text, NAMES).terms]


@pytest.mark.parametrize("text", NAMES)
def test_the_base_has_no_terms(text: str) -> None:
    assert terms(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sql", [("sql", 1.0)]),
        ("sql:3", [("sql:3", 1.0)]),
        (f"sql@{DIGEST}", [(f"sql@{DIGEST}", 1.0)]),
        ("sql@step-40", [("sql@step-40", 1.0)]),
        ("acme/sql", [("acme/sql", 1.0)]),
        ("a*0.7+b*0.3", [("a", 0.7), ("b", 0.3)]),
        ("a*.5 + b", [("a", 0.5), ("b", 1.0)]),
        ("a-b*-0.25+c:2*+2.", [("a-b", -0.25), ("c:2", 2.0)]),
        ("a*1e-3+b*1E+1", [("a", 0.001), ("b", 10.0)]),
        ("a+a", [("a", 1.0), ("a", 1.0)]),
    ],
)
def test_forms(text: str, expected: list[tuple[str, float]]) -> None:
    assert terms(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "GPT-4",
        "Qwen/Qwen2",
        "../secret",
        "sql\x00",
        "%2e%2e",
        "sql:0",
        "sql:03",
        "sql@sha256:12",
        "sql:1@step-2",
        "a b",
        "\u202esql",
        "🦋",
        "/",
        "a/b/c",
        "n" * 300,
    ],
)
def test_what_can_be_no_name_is_not_found(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_model(text, NAMES)
    assert (caught.value.status_code, caught.value.code) == (404, "model_not_found")


@pytest.mark.parametrize(
    "text",
    [
        *("a*", "*0.5", "a**2", "a*b", "+", "a+", "+a", "a*nan", "a*inf", "a*0x1", "a*1*2"),
        *("a*1_0", "base+a", "a*0.5+base*0.5", "a+" * LONGEST),
    ],
)
def test_what_is_no_mix_is_refused(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_model(text, NAMES)
    assert (caught.value.status_code, caught.value.param) == (400, "model")


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    statuses = []
    try:
        parse_model(text, NAMES)
    except ApiError as error:
        error.response()  # whatever the text, the reply can be encoded
        statuses = [error.status_code]
    assert statuses in ([], [400], [404])


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True).filter(
                lambda name: name not in NAMES
            ),
            st.floats(-16, 16, allow_nan=False),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_what_is_written_is_read(members: list[tuple[str, float]]) -> None:
    assert terms("+".join(f"{name}*{weight!r}" for name, weight in members)) == members
