"""The blobs of tenants' files: shared, collected, damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.store.catalog.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    FileCorrupt,
    FileNotFound,
    NotOwner,
)
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.removing import collect
from tests.store.support import (
    BASE,
    LINE,
    blob_path,
    flip_a_bit,
    make_digest,
    make_file,
    push,
    push_file,
    read_file,
    rows,
    stored_blobs,
)


def test_equal_files_share_a_blob_until_the_last_one_goes(store: Store, tmp_path: Path) -> None:
    mine, theirs = push_file(store.files, "a", LINE), push_file(store.files, "b", LINE, "zeta")
    assert stored_blobs(tmp_path) == {mine.blob_id}
    store.files.delete("acme", mine.id)
    assert read_file(store.files, theirs, "zeta") == LINE
    store.files.delete("zeta", theirs.id)
    assert stored_blobs(tmp_path) == set()
    assert rows(tmp_path, "SELECT * FROM blobs") == []


@pytest.mark.parametrize("first", ["file", "adapter"])
def test_a_blob_of_a_file_and_an_adapter_goes_when_neither_needs_it(
    store: Store, tmp_path: Path, first: str
) -> None:
    version, file = push(store.catalog, "sql", 1), push_file(store.files, "a", make_file(1))
    assert version.blob_id == file.blob_id
    deletes = {
        "file": lambda: store.files.delete("acme", file.id),
        "adapter": lambda: store.catalog.delete("acme", "sql"),
    }
    deletes.pop(first)()
    assert store.catalog.recover().blobs == 0
    if first == "file":
        assert store.catalog.open(version.digest).nnz == version.nnz
    else:
        assert read_file(store.files, file) == make_file(1)
    deletes.popitem()[1]()
    assert stored_blobs(tmp_path) == set()


def test_a_file_that_is_read_is_collected_when_the_reader_is_done(
    store: Store, tmp_path: Path
) -> None:
    file = push_file(store.files, "a", LINE)
    with store.files.content("acme", file.id) as path:
        store.files.delete("acme", file.id)
        assert store.catalog.recover().blobs == 0
        assert path.read_bytes() == LINE
    store.catalog.close()  # waits for the collector
    assert stored_blobs(tmp_path) == set()


def test_only_the_owner_unlinks(store: Store, tmp_path: Path) -> None:
    file = push_file(store.files, "a", LINE)
    with Store(tmp_path, BASE) as other:
        other.files.delete("acme", file.id)
        assert stored_blobs(tmp_path) == {file.blob_id}
        with pytest.raises(NotOwner):
            collect(other.catalog._parts, file.blob_id)
    assert store.catalog.recover().blobs == 1
    assert stored_blobs(tmp_path) == set()


def test_a_deleted_file_that_a_reader_finds_gone_is_not_found(store: Store, tmp_path: Path) -> None:
    file = push_file(store.files, "a", LINE)
    with Store(tmp_path, BASE) as other:  # its reads are no holds of the owner's
        held = other.files._hold("acme", file.id, None)
        store.files.delete("acme", file.id)
        with pytest.raises(FileNotFound), other.files._verified(held):
            pass
        other.files._collector.give_back([held])


# ---- damage


def damage(tmp_path: Path, blob_id: str, how: str) -> None:
    path = blob_path(tmp_path, blob_id)
    if how == "missing":
        path.unlink()
    else:
        flip_a_bit(path)


@pytest.mark.parametrize("how", ["missing", "changed"])
def test_damage_is_found_and_the_same_bytes_mend_it(store: Store, tmp_path: Path, how: str) -> None:
    file = push_file(store.files, "a", LINE)
    damage(tmp_path, file.blob_id, how)
    with pytest.raises(FileCorrupt, match=how) as caught:
        read_file(store.files, file)
    assert caught.value.file_id == file.id
    with pytest.raises(FileCorrupt):  # and again
        read_file(store.files, file)
    assert store.files.get("acme", file.id) == file
    assert (tmp_path / "store" / "quarantine" / file.blob_id).exists() == (how == "changed")
    push_file(store.files, "b", LINE)
    assert read_file(store.files, file) == LINE


@pytest.mark.parametrize("finder", ["file", "adapter"])
def test_whoever_finds_the_damage_of_a_shared_blob_both_are_told(
    store: Store, tmp_path: Path, finder: str
) -> None:
    version, file = push(store.catalog, "sql", 1), push_file(store.files, "a", make_file(1))
    damage(tmp_path, file.blob_id, "changed")
    if finder == "adapter":
        with pytest.raises(AdapterCorrupt):
            store.catalog.open(version.digest)
    with pytest.raises(FileCorrupt):
        read_file(store.files, file)
    assert store.catalog.show("acme", "sql").versions[0].status == "corrupt"
    with pytest.raises(AdapterNotFound):
        store.catalog.resolve("acme", ["sql"])
    push_file(store.files, "b", make_file(1))
    assert store.catalog.open(make_digest(1)).nnz == version.nnz
    assert read_file(store.files, file) == make_file(1)
