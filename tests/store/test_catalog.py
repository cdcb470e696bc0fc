"""The catalog's door: tenants, resolve and hold, list, download, roll back, delete."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.errors import (
    AdapterNotFound,
    CurrentVersion,
    InvalidName,
    NoEarlierVersion,
    TenantExists,
    TenantNotFound,
    WrongBase,
)
from gossamer.store.failpoints import Failpoint
from gossamer.store.format import digest
from tests.store.support import (
    BASE,
    OTHER_BASE,
    make_digest,
    make_file,
    meaning,
    opened,
    push,
    stored_blobs,
)


def test_an_unknown_tenant(catalog: Catalog) -> None:
    with pytest.raises(TenantNotFound):
        push(catalog, "sql", 1, tenant="nobody")
    assert catalog.list("nobody") == []
    with pytest.raises(AdapterNotFound):
        catalog.resolve("nobody", ["sql"])


def test_tenants_are_made_once(catalog: Catalog) -> None:
    catalog.create_tenant("umbrella")
    assert catalog.tenants() == ["acme", "umbrella", "zeta"]
    with pytest.raises(TenantExists):
        catalog.create_tenant("umbrella")
    with pytest.raises(InvalidName):
        catalog.create_tenant("Umbrella Corp")


# ---- holds


def test_resolving_is_all_or_nothing(catalog: Catalog) -> None:
    push(catalog, "sql", 1)
    with pytest.raises(AdapterNotFound):
        catalog.resolve("acme", ["sql", "math"])
    assert len(catalog._holds) == 0


def test_resolving_nothing_holds_nothing(catalog: Catalog) -> None:
    with catalog.resolve("acme", []) as resolution:
        assert resolution.versions == ()


def test_a_request_keeps_what_it_resolved(catalog: Catalog, tmp_path: Path) -> None:
    first = push(catalog, "sql", 1)
    with catalog.resolve("acme", ["sql"]) as in_flight:
        second = push(catalog, "sql", 2)
        assert in_flight.versions[0].digest == first.digest
        assert meaning(catalog, "sql") == second.digest
        catalog.delete("acme", "sql", 1)
        with pytest.raises(AdapterNotFound):
            catalog.resolve("acme", ["sql:1"])
        assert digest(catalog.open(in_flight.versions[0].digest)) == first.digest
        assert first.blob_id in stored_blobs(tmp_path)
    catalog.close()  # waits for the collector
    assert stored_blobs(tmp_path) == {second.blob_id}


def test_a_held_adapter_is_kept_until_its_last_hold_ends(catalog: Catalog, tmp_path: Path) -> None:
    version = push(catalog, "sql", 1)
    holds = [catalog.resolve("acme", ["sql", "sql"]) for _ in range(3)]
    catalog.delete("acme", "sql")
    for hold in holds:
        assert stored_blobs(tmp_path) == {version.blob_id}
        assert catalog.open(version.digest)
        hold.release()
        hold.release()
    catalog.close()
    assert stored_blobs(tmp_path) == set()
    with pytest.raises(AdapterNotFound):
        catalog.open(version.digest)


def test_a_deleted_file_uploaded_again_survives_the_old_hold(
    catalog: Catalog, tmp_path: Path
) -> None:
    push(catalog, "sql", 1)
    hold = catalog.resolve("acme", ["sql"])
    catalog.delete("acme", "sql")
    again = push(catalog, "sql", 1)
    hold.release()
    catalog.close()
    assert stored_blobs(tmp_path) == {again.blob_id}
    assert catalog.open(again.digest)


def test_a_hold_released_after_the_close_is_collected_at_the_next_start(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        push(store.catalog, "sql", 1)
        hold = store.catalog.resolve("acme", ["sql"])
        store.catalog.delete("acme", "sql")
    hold.release()
    assert len(stored_blobs(tmp_path)) == 1
    with opened(tmp_path):
        assert stored_blobs(tmp_path) == set()


def test_a_delete_between_the_reading_and_the_hold_is_noticed(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(catalog, "sql", 1)
    take = catalog._holds.take
    between: list[str] = []

    def late(*arguments: object) -> bool:
        if not between:
            between.append("delete")
            catalog.delete("acme", "sql")
        return take(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(catalog._holds, "take", late)
    with pytest.raises(AdapterNotFound):
        catalog.resolve("acme", ["sql"])
    assert between
    assert len(catalog._holds) == 0


# ---- list, show, download


def test_adapters_are_listed_by_name_with_their_versions(catalog: Catalog) -> None:
    for name, seed in (("sql", 1), ("math", 2), ("sql", 3)):
        push(catalog, name, seed)
    listed = catalog.list("acme")
    assert [(a.name, a.current, [v.number for v in a.versions]) for a in listed] == [
        ("math", 1, [1]),
        ("sql", 2, [1, 2]),
    ]
    assert catalog.show("acme", "sql") == listed[1]
    assert [v.current for v in listed[1].versions] == [False, True]
    with pytest.raises(AdapterNotFound):
        catalog.show("acme", "code")


def test_a_download_is_the_uploaded_file(catalog: Catalog) -> None:
    push(catalog, "sql", 1)
    push(catalog, "sql", 2)
    with catalog.download("acme", "sql:1") as download:
        catalog.delete("acme", "sql", 1)
        assert download.path.read_bytes() == make_file(1)
        assert download.version.digest == make_digest(1)
    with pytest.raises(AdapterNotFound), catalog.download("acme", "sql:1"):
        pass


def test_a_version_for_another_base_is_kept_and_not_served(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        version = push(store.catalog, "sql", 1)
        foreign = store.catalog.upload("acme", "foreign", [make_file(2, fingerprint="")])
    with opened(tmp_path, base=OTHER_BASE) as store:
        with pytest.raises(WrongBase) as caught:
            store.catalog.resolve("acme", ["sql"])
        assert caught.value.made_for == BASE.fingerprint
        for known in (version, foreign):
            with pytest.raises(AdapterNotFound):
                store.catalog.open(known.digest)
        assert store.catalog.show("acme", "sql").versions[0].digest == version.digest
        with store.catalog.download("acme", "sql") as download:
            assert download.path.read_bytes() == make_file(1)
        # a file that names no base is a new version here, though its digest is the same
        again = store.catalog.upload("acme", "foreign", [make_file(2, fingerprint="")])
        assert (again.number, again.digest) == (2, foreign.digest)
        assert store.catalog.open(again.digest)


# ---- roll back


def test_roll_back_goes_one_version_back(catalog: Catalog) -> None:
    digests = [push(catalog, "sql", seed).digest for seed in (1, 2, 3)]
    assert catalog.rollback("acme", "sql").number == 2
    assert meaning(catalog, "sql") == digests[1]
    assert catalog.rollback("acme", "sql").number == 1
    with pytest.raises(NoEarlierVersion):
        catalog.rollback("acme", "sql")
    assert catalog.rollback("acme", "sql", 3).current
    assert meaning(catalog, "sql") == digests[2]


def test_roll_back_skips_what_is_deleted(catalog: Catalog) -> None:
    for seed in (1, 2, 3):
        push(catalog, "sql", seed)
    catalog.delete("acme", "sql", 2)
    with pytest.raises(AdapterNotFound):
        catalog.rollback("acme", "sql", 2)
    assert catalog.rollback("acme", "sql").number == 1


def test_an_upload_after_a_roll_back_gets_a_new_number(catalog: Catalog) -> None:
    for seed in (1, 2):
        push(catalog, "sql", seed)
    catalog.rollback("acme", "sql")
    assert push(catalog, "sql", 3).number == 3
    assert catalog.rollback("acme", "sql").number == 2


# ---- delete


def test_the_current_of_several_versions_is_not_deleted(catalog: Catalog) -> None:
    push(catalog, "sql", 1)
    push(catalog, "sql", 2)
    with pytest.raises(CurrentVersion) as caught:
        catalog.delete("acme", "sql", 2)
    assert (caught.value.name, caught.value.number) == ("sql", 2)
    catalog.rollback("acme", "sql")
    catalog.delete("acme", "sql", 2)
    catalog.delete("acme", "sql", 1)  # the last one takes the adapter with it
    with pytest.raises(AdapterNotFound):
        catalog.show("acme", "sql")


def test_a_deleted_name_may_be_used_again_and_numbers_never_are(catalog: Catalog) -> None:
    push(catalog, "sql", 1)
    push(catalog, "sql", 2)
    catalog.delete("acme", "sql")
    assert catalog.list("acme") == []
    again = push(catalog, "sql", 1)
    assert again.number == 3
    assert [v.number for v in catalog.show("acme", "sql").versions] == [3]
    with pytest.raises(AdapterNotFound):
        meaning(catalog, "sql:1")


def test_deleting_what_is_not_there(catalog: Catalog) -> None:
    push(catalog, "sql", 1)
    for name, version in (("math", None), ("sql", 2), ("sql", "step-1")):
        with pytest.raises(AdapterNotFound):
            catalog.delete("acme", name, version)
    assert catalog.show("acme", "sql").current == 1


def test_deletes_pass_their_failpoints_in_order(tmp_path: Path) -> None:
    seen: list[Failpoint] = []
    with opened(tmp_path, failpoint=seen.append) as store:
        push(store.catalog, "sql", 1)
        store.catalog.delete("acme", "sql")
    assert seen == [p for p in Failpoint if not p.startswith("file.")]
