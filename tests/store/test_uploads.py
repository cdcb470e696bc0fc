"""What may be uploaded, which version it becomes, and what a refused upload leaves."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.errors import (
    AdapterNotFound,
    InvalidName,
    NoEarlierVersion,
    ReservedName,
    UploadTooLarge,
)
from gossamer.store.delta import DeltaSet
from gossamer.store.errors import AdapterFileError
from gossamer.store.format import digest, write
from tests.store.support import (
    BASE,
    OTHER_BASE,
    make_deltas,
    make_digest,
    make_file,
    meaning,
    opened,
    push,
    rows,
    stored_blobs,
    temp_files,
)


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


# ---- refusals and warnings


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
