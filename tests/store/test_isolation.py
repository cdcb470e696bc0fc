"""One tenant cannot tell another's adapters from adapters that do not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.errors import AdapterCorrupt, AdapterNotFound
from tests.store.support import blob_path, make_digest, opened, push, rows

OTHERS, MISSING, DELETED, CORRUPT = "secret", "missing", "deleted", "broken"


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with opened(tmp_path, ("acme", "zeta")) as store:
        push(store.catalog, OTHERS, 1, tenant="zeta")
        push(store.catalog, OTHERS, 5, tenant="zeta", tag="step-40")
        push(store.catalog, DELETED, 2)
        store.catalog.delete("acme", DELETED)
        broken = push(store.catalog, CORRUPT, 3)
        blob_path(tmp_path, broken.blob_id).write_bytes(b"")
        with pytest.raises(AdapterCorrupt):
            store.catalog.open(broken.digest)
        push(store.catalog, "sql", 4)
        yield store.catalog


def refusal(act: Callable[[], object], name: str) -> tuple[type, str, list[str]]:
    """What an attempt is answered with, the name put aside."""
    with pytest.raises(AdapterNotFound) as caught:
        act()
    error = caught.value
    return type(error), str(error).replace(name, "NAME"), sorted(vars(error))


@pytest.mark.parametrize(
    "form", ["{}", "zeta/{}", "acme/{}", "{}:1", "{}@step-40", "{}@" + make_digest(1)]
)
def test_every_unusable_reference_gets_the_same_answer(catalog: Catalog, form: str) -> None:
    answers = {
        str(refusal(lambda name=name: catalog.resolve("acme", [form.format(name)]), name))  # type: ignore[misc]
        for name in (OTHERS, MISSING, DELETED, CORRUPT)
    }
    assert len(answers) == 1


def test_what_is_no_reference_gets_that_answer_too(catalog: Catalog) -> None:
    for text in ("../secret", "Secret", "", "a" * 5000, "secret\0", "zeta/../secret"):
        with pytest.raises(AdapterNotFound) as caught:
            catalog.resolve("acme", [text])
        assert "does not exist or you do not have access to it" in str(caught.value)
        assert len(str(caught.value)) < 400


def test_no_other_operation_tells_more(catalog: Catalog) -> None:
    operations: list[Callable[[str], object]] = [
        lambda name: catalog.show("acme", name),
        lambda name: catalog.delete("acme", name),
        lambda name: catalog.delete("acme", name, 1),
        lambda name: catalog.rollback("acme", name),
        lambda name: catalog.rollback("acme", name, 1),
        lambda name: catalog.download("acme", name).__enter__(),
    ]
    for operation in operations:
        answers = {
            str(refusal(lambda name=name: operation(name), name))  # type: ignore[misc]  # noqa: B023
            for name in (OTHERS, MISSING, DELETED)
        }
        assert len(answers) == 1
    assert [a.name for a in catalog.list("acme")] == [CORRUPT, "sql"]
    assert [a.name for a in catalog.list("zeta")] == [OTHERS]


def test_a_tenant_names_its_own_either_way(catalog: Catalog) -> None:
    for name in (OTHERS, f"zeta/{OTHERS}", f"zeta/{OTHERS}:1", f"{OTHERS}@step-40"):
        with catalog.resolve("zeta", [name]) as resolution:
            assert resolution.versions[0].tenant == "zeta"


def test_equal_names_of_two_tenants_are_two_adapters(catalog: Catalog, tmp_path: Path) -> None:
    push(catalog, OTHERS, 6)
    with catalog.resolve("acme", [OTHERS]) as mine, catalog.resolve("zeta", [OTHERS]) as theirs:
        assert mine.versions[0].digest == make_digest(6)
        assert theirs.versions[0].digest == make_digest(1)
    catalog.delete("acme", OTHERS)
    with catalog.resolve("zeta", [OTHERS]) as theirs:
        assert theirs.versions[0].digest == make_digest(1)
    assert len(rows(tmp_path, f"SELECT * FROM adapters WHERE name = '{OTHERS}'")) == 2  # noqa: S608
