"""The catalog's door: upload, resolve, open, list, download, roll back, delete."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy.orm import Session

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.errors import (
    AdapterNotFound,
    AlreadyOwned,
    CurrentVersion,
    InvalidName,
    NoEarlierVersion,
    NotOwner,
    ReservedName,
    TenantExists,
    TenantNotFound,
    UploadInterrupted,
    UploadTooLarge,
    WrongBase,
)
from gossamer.store.catalog.names import Ref
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import StoreLimits, VersionInfo
from gossamer.store.delta import DeltaSet
from gossamer.store.errors import AdapterFileError
from gossamer.store.failpoints import Failpoint
from gossamer.store.format import digest, write
from gossamer.store.registry.models import Tenant
from tests.store.support import (
    BASE,
    OTHER_BASE,
    Clock,
    make_deltas,
    make_digest,
    make_file,
    opened,
    push,
    rows,
    stored_blobs,
    temp_files,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with opened(tmp_path, ("acme", "zeta")) as store:
        yield store


@pytest.fixture
def catalog(store: Store) -> Catalog:
    return store.catalog


def meaning(catalog: Catalog, ref: str | Ref, tenant: str = "acme") -> str:
    with catalog.resolve(tenant, [ref]) as resolution:
        return resolution.versions[0].digest


def test_an_upload_tells_what_it_found(catalog: Catalog) -> None:
    version = push(catalog, "sql", 1)
    assert (version.tenant, version.name, version.number, version.tag) == ("acme", "sql", 1, None)
    assert version.label == "sql:1"
    assert version.digest == make_digest(1)
    assert version.nbytes == len(make_file(1))
    assert version.nnz == 400
    assert version.density == 400 / (64 * 48 + 32 * 64)
    assert [(m.name, m.shape, m.nnz) for m in version.modules] == [
        ("a.weight", (64, 48), 200),
        ("b.weight", (32, 64), 200),
    ]
    assert version.modules[0].density == 200 / (64 * 48)
    assert version.record == {"seed": 1}
    assert version.warnings == ()
    assert version.base_verified
    assert version.current
    assert version.status == "active"
    assert version.created_at.utcoffset() is not None


def test_what_was_uploaded_opens_again(catalog: Catalog) -> None:
    version = push(catalog, "sql", 1)
    found, wanted = catalog.open(version.digest), make_deltas(1)
    assert digest(found) == version.digest == digest(wanted)
    for name, delta in wanted.deltas.items():
        np.testing.assert_array_equal(found.deltas[name].dense(), delta.dense())


@pytest.mark.parametrize("kind", ["chunks", "file object", "path", "spool"])
def test_an_upload_may_come_in_many_ways(catalog: Catalog, tmp_path: Path, kind: str) -> None:
    data = make_file(1)
    if kind == "chunks":
        version = catalog.upload("acme", "sql", [data[i : i + 7] for i in range(0, len(data), 7)])
    elif kind == "file object":
        version = catalog.upload("acme", "sql", io.BytesIO(data))
    elif kind == "path":
        (tmp_path / "adapter.safetensors").write_bytes(data)
        version = catalog.upload("acme", "sql", tmp_path / "adapter.safetensors")
    else:
        with catalog.spool() as spool:
            spool.write(data)
            version = catalog.upload("acme", "sql", spool)
    assert version.digest == make_digest(1)
    assert temp_files(tmp_path) == []


def test_a_new_upload_is_the_next_version_and_the_name_follows(catalog: Catalog) -> None:
    first, second = push(catalog, "sql", 1), push(catalog, "sql", 2)
    assert (first.number, second.number) == (1, 2)
    assert meaning(catalog, "sql") == second.digest
    assert meaning(catalog, "sql:1") == first.digest
    assert meaning(catalog, "acme/sql:2") == second.digest
    assert meaning(catalog, f"sql@{first.digest}") == first.digest


def test_an_upload_may_leave_the_name_where_it_is(catalog: Catalog) -> None:
    first = push(catalog, "sql", 1)
    second = push(catalog, "sql", 2, activate=False)
    assert not second.current
    assert meaning(catalog, "sql") == first.digest
    assert meaning(catalog, "sql:2") == second.digest
    lone = push(catalog, "draft", 3, activate=False)
    with pytest.raises(AdapterNotFound):
        meaning(catalog, "draft")
    assert meaning(catalog, "draft:1") == lone.digest


def test_an_upload_repeated_makes_no_second_version(catalog: Catalog, tmp_path: Path) -> None:
    first = push(catalog, "sql", 1)
    assert push(catalog, "sql", 1) == first
    draft = push(catalog, "sql", 2, activate=False)
    assert push(catalog, "sql", 2, activate=False) == draft
    assert push(catalog, "sql", 2).current  # the same upload, to be made current this time
    assert push(catalog, "sql", 1).number == 3  # neither the newest nor the current one
    assert len(stored_blobs(tmp_path)) == 2


def test_one_digest_in_two_files_is_one_version(catalog: Catalog, tmp_path: Path) -> None:
    version = push(catalog, "sql", 1)
    raw = io.BytesIO()
    write(make_deltas(1), raw, coding="raw")
    assert raw.getvalue() != make_file(1)
    assert catalog.upload("acme", "sql", [raw.getvalue()]) == version
    other = catalog.upload("acme", "raw", [raw.getvalue()])
    assert other.digest == version.digest
    assert other.blob_id != version.blob_id
    catalog.delete("acme", "sql")
    assert digest(catalog.open(version.digest)) == version.digest  # from the other file


def test_equal_files_share_a_blob_until_the_last_is_deleted(
    catalog: Catalog, tmp_path: Path
) -> None:
    push(catalog, "sql", 1)
    push(catalog, "copy", 1)
    push(catalog, "sql", 1, tenant="zeta")
    assert len(stored_blobs(tmp_path)) == 1
    catalog.delete("acme", "sql")
    catalog.delete("zeta", "sql")
    assert len(stored_blobs(tmp_path)) == 1
    assert digest(catalog.open(make_digest(1))) == make_digest(1)
    catalog.delete("acme", "copy")
    assert stored_blobs(tmp_path) == set()
    with pytest.raises(AdapterNotFound):
        catalog.open(make_digest(1))


@pytest.mark.parametrize("name", ["base", "toy-base"])
def test_the_base_names_cannot_be_taken(catalog: Catalog, name: str) -> None:
    with pytest.raises(ReservedName):
        push(catalog, name, 1)


@pytest.mark.parametrize("name", ["../sql", "SQL", "a/b", "a:1", "", "a" * 129])
def test_bad_names_are_refused_before_a_byte_is_read(catalog: Catalog, name: str) -> None:
    file = io.BytesIO(make_file(1))
    with pytest.raises(InvalidName):
        catalog.upload("acme", name, file)
    assert file.tell() == 0


def test_a_refused_file_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    data = bytearray(make_file(1))
    for bad in (
        b"",
        b"\x80\x02}q\0.",
        bytes(data[:-1]),
        make_file(1, fingerprint=OTHER_BASE.fingerprint),
    ):
        with pytest.raises(AdapterFileError):
            catalog.upload("acme", "sql", [bad])
    assert catalog.list("acme") == []
    assert stored_blobs(tmp_path) == set()
    assert temp_files(tmp_path) == []
    assert rows(tmp_path, "SELECT * FROM uploads") == []


def test_too_large_an_upload_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path, upload_bytes=100) as store:
        with pytest.raises(UploadTooLarge) as caught:
            push(store.catalog, "sql", 1)
        assert caught.value.limit == 100
        assert temp_files(tmp_path) == []


def test_a_stream_that_breaks_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield make_file(1)[:100]
        raise ConnectionResetError("the client is gone")

    with pytest.raises(ConnectionResetError):
        catalog.upload("acme", "sql", broken())
    assert catalog.list("acme") == []
    assert temp_files(tmp_path) == []


def test_a_file_without_a_fingerprint_is_taken_with_a_warning(catalog: Catalog) -> None:
    version = push(catalog, "foreign", 1)
    data = make_file(1, fingerprint="")
    foreign = catalog.upload("acme", "foreign", [data])
    assert version.base_verified
    assert not foreign.base_verified
    assert foreign.digest != version.digest
    assert "which base model" in foreign.warnings[0]
    assert catalog.open(foreign.digest).deltas.keys() == BASE.table.keys()


def test_an_empty_adapter_is_taken_with_a_warning(catalog: Catalog) -> None:
    file = io.BytesIO()
    write(DeltaSet(BASE.fingerprint, "toy-base", {}), file)
    version = catalog.upload("acme", "empty", [file.getvalue()])
    assert (version.nnz, version.density, version.modules) == (0, 0.0, ())
    assert "as the base does" in version.warnings[0]


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


# ---- checkpoints


def test_a_checkpoint_has_a_tag_and_is_never_current(catalog: Catalog) -> None:
    checkpoint = push(catalog, "sql", 1, tag="step-40")
    assert (checkpoint.number, checkpoint.tag, checkpoint.label) == (None, "step-40", "sql@step-40")
    assert not checkpoint.current
    with pytest.raises(AdapterNotFound):
        meaning(catalog, "sql")
    assert meaning(catalog, "sql@step-40") == checkpoint.digest
    final = push(catalog, "sql", 2)
    assert final.number == 1
    assert meaning(catalog, "sql") == final.digest
    with pytest.raises(NoEarlierVersion):
        catalog.rollback("acme", "sql")


def test_the_same_checkpoint_again_replaces_it(catalog: Catalog, tmp_path: Path) -> None:
    first = push(catalog, "sql", 1, tag="step-40")
    assert push(catalog, "sql", 1, tag="step-40") == first
    second = push(catalog, "sql", 2, tag="step-40")
    assert meaning(catalog, "sql@step-40") == second.digest
    assert stored_blobs(tmp_path) == {second.blob_id}


def test_a_checkpoint_is_deleted_by_its_tag(catalog: Catalog) -> None:
    push(catalog, "sql", 1, tag="step-40")
    push(catalog, "sql", 2)
    catalog.delete("acme", "sql", "step-40")
    with pytest.raises(AdapterNotFound):
        meaning(catalog, "sql@step-40")
    catalog.delete("acme", "sql", 1)
    assert catalog.list("acme") == []


def test_a_checkpoint_needs_a_step(catalog: Catalog) -> None:
    with pytest.raises(InvalidName):
        push(catalog, "sql", 1, tag="latest")


# ---- another base


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


# ---- owner and others


def test_another_process_tombstones_and_the_owner_collects(tmp_path: Path) -> None:
    with opened(tmp_path) as server, opened(tmp_path, owner=False) as command_line:
        version = push(command_line.catalog, "sql", 1)
        hold = server.catalog.resolve("acme", ["sql"])
        command_line.catalog.delete("acme", "sql")
        with pytest.raises(AdapterNotFound):
            server.catalog.resolve("acme", ["sql"])
        assert server.catalog.open(version.digest)
        assert server.catalog.recover().blobs == 0
        hold.release()
        server.catalog.close()
        assert stored_blobs(tmp_path) == set()
        with pytest.raises(NotOwner):
            command_line.catalog.recover()


def test_one_folder_has_one_owner(tmp_path: Path) -> None:
    with opened(tmp_path):
        with pytest.raises(AlreadyOwned):
            Store(tmp_path, BASE, owner=True)
        with Store(tmp_path, BASE):
            pass
    with opened(tmp_path):
        pass


def test_recovery_leaves_a_running_upload_its_blob(tmp_path: Path) -> None:
    clock, asked = Clock(), []

    with opened(tmp_path, clock=clock) as server:

        def between(point: Failpoint) -> None:
            if point is Failpoint.UPLOAD_STORED:
                asked.append(server.catalog.recover())

        with opened(tmp_path, owner=False, clock=clock, failpoint=between) as worker:
            version = push(worker.catalog, "sql", 1)
        assert [r.blobs for r in asked] == [0]
        assert server.catalog.open(version.digest)
        assert rows(tmp_path, "SELECT * FROM uploads") == []


def test_an_upload_that_outlives_the_grace_is_dropped_as_a_whole(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock=clock, limits=StoreLimits(grace_s=60)) as server:

        def between(point: Failpoint) -> None:
            if point is Failpoint.UPLOAD_STORED:
                clock.advance(61)
                assert server.catalog.recover().blobs == 1

        with (
            opened(tmp_path, owner=False, clock=clock, failpoint=between) as worker,
            pytest.raises(UploadInterrupted),
        ):
            push(worker.catalog, "sql", 1)
        assert server.catalog.list("acme") == []
        assert stored_blobs(tmp_path) == set()
        assert push(server.catalog, "sql", 1).number == 1


def test_recovery_removes_blobs_that_nobody_knows_but_not_fresh_ones(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        with store.catalog.spool() as spool:
            spool.write(b"from a database that was lost")
            blob_id = store.catalog._parts.blobs.put(spool)
        assert store.catalog.recover().blobs == 0
        assert stored_blobs(tmp_path) == {blob_id}
    with opened(tmp_path, limits=StoreLimits(grace_s=-1)):
        assert stored_blobs(tmp_path) == set()
        assert rows(tmp_path, "SELECT * FROM blobs") == []


# ---- in one transaction with what another room writes


def _refuse(session: Session, version: VersionInfo) -> None:
    session.add(Tenant(name="half", created_at=datetime.now(UTC)))
    session.flush()
    raise LookupError(version.label)


def _note(session: Session, version: VersionInfo) -> None:
    label = version.label.replace(":", ".").replace("@", ".")
    session.add(Tenant(name=f"{label}.{version.current}".lower(), created_at=datetime.now(UTC)))


@pytest.mark.parametrize("activate", [True, False])
def test_what_is_written_also_is_written_with_the_version(catalog: Catalog, activate: bool) -> None:
    push(catalog, "sql", 1)
    push(catalog, "sql", 2, activate=activate, also=_note)
    assert f"sql.2.{activate}".lower() in catalog.tenants()


def test_it_is_written_when_the_upload_repeats_a_version_too(catalog: Catalog) -> None:
    push(catalog, "sql", 1)
    assert push(catalog, "sql", 1, also=_note).number == 1
    push(catalog, "sql", 2, tag="step-4")
    push(catalog, "sql", 2, tag="step-4", also=_note)
    assert {"sql.1.true", "sql.step-4.false"} <= set(catalog.tenants())


@pytest.mark.parametrize("options", [{}, {"tag": "step-4"}, {"activate": False}])
def test_if_that_fails_there_is_no_version(
    store: Store, tmp_path: Path, options: dict[str, Any]
) -> None:
    push(store.catalog, "sql", 1)
    kept = push(store.catalog, "sql", 2, tag="step-4")
    before = rows(tmp_path, "SELECT * FROM adapters"), rows(tmp_path, "SELECT * FROM versions")
    blobs = stored_blobs(tmp_path)
    for name in ("sql", "new"):
        with pytest.raises(LookupError):
            push(store.catalog, name, 3, also=_refuse, **options)
    after = rows(tmp_path, "SELECT * FROM adapters"), rows(tmp_path, "SELECT * FROM versions")
    assert after == before
    assert "half" not in store.catalog.tenants()
    assert stored_blobs(tmp_path) == blobs
    assert rows(tmp_path, "SELECT * FROM uploads") == []
    assert meaning(store.catalog, "sql@step-4") == kept.digest


def test_a_repeated_upload_whose_rest_fails_moves_no_pointer(catalog: Catalog) -> None:
    first = push(catalog, "sql", 1)
    push(catalog, "sql", 2, activate=False)
    with pytest.raises(LookupError):
        push(catalog, "sql", 2, also=_refuse)
    assert meaning(catalog, "sql") == first.digest


def test_what_a_failed_upload_leaves_in_another_process_recover_removes(
    store: Store, tmp_path: Path
) -> None:
    with Store(tmp_path, BASE) as worker, pytest.raises(LookupError):
        push(worker.catalog, "sql", 1, also=_refuse)
    assert len(stored_blobs(tmp_path)) == 1
    assert store.catalog.recover().blobs == 1
    assert stored_blobs(tmp_path) == set()
    assert rows(tmp_path, "SELECT * FROM blobs") == []
