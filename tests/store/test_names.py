"""How references are read, and which names are refused."""

from __future__ import annotations

import pytest

from gossamer.store.catalog.errors import InvalidName, ReservedName
from gossamer.store.catalog.names import Ref, check_name, check_new_name, check_tag

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("sql", Ref("sql", "sql")),
        ("sql:3", Ref("sql:3", "sql", number=3)),
        (f"sql@sha256:{HEX}", Ref(f"sql@sha256:{HEX}", "sql", digest=f"sha256:{HEX}")),
        ("sql@step-40", Ref("sql@step-40", "sql", tag="step-40")),
        ("sql@step-0", Ref("sql@step-0", "sql", tag="step-0")),
        ("acme/sql", Ref("acme/sql", "sql", tenant="acme")),
        ("acme/sql:12", Ref("acme/sql:12", "sql", tenant="acme", number=12)),
        ("0", Ref("0", "0")),
        ("a.b_c-d", Ref("a.b_c-d", "a.b_c-d")),
        ("a" * 128, Ref("a" * 128, "a" * 128)),
    ],
)
def test_every_form_of_a_reference(text: str, wanted: Ref) -> None:
    assert Ref.parse(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "SQL",
        "sql ",
        "sql\n",
        "-sql",
        ".sql",
        "../etc/passwd",
        "a/../b",
        "/sql",
        "acme/",
        "a/b/c",
        "sql:",
        "sql:0",
        "sql:01",
        "sql:-1",
        "sql:x",
        "sql:٣",  # an Arabic-Indic digit is a digit to str.isdigit and to \d
        "sql:9999999999",
        "sql@",
        "sql@latest",
        "sql@step-",
        "sql@step-01",
        "sql@sha256:abc",
        f"sql@sha256:{HEX.upper()}",
        f"sql:3@sha256:{HEX}",
        "sql\0",
        "%2e%2e",
        "sql\u202e",
        "🦊",
        "a" * 129,
        "a" * 4096,
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidName) as caught:
        Ref.parse(text)
    message = str(caught.value)
    assert len(message) < 400
    assert message.isascii()
    assert message.isprintable()


def test_the_base_names_are_reserved() -> None:
    for name in ("base", "smollm2-135m"):
        with pytest.raises(ReservedName):
            check_new_name(name, "SmolLM2-135M")
    assert check_new_name("sql", "SmolLM2-135M") == "sql"
    with pytest.raises(InvalidName):
        check_new_name("no spaces", "SmolLM2-135M")


def test_tenants_are_named_like_adapters() -> None:
    assert check_name("acme-2.eu") == "acme-2.eu"
    with pytest.raises(InvalidName):
        check_name("acme/eu")


def test_a_tag_is_a_step() -> None:
    assert check_tag("step-40") == "step-40"
    for tag in ("40", "step-4 ", "step--4", "final"):
        with pytest.raises(InvalidName):
            check_tag(tag)
