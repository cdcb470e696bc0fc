"""Bytes are taken away while nobody waits for it, and no upload loses its own by that."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gossamer.store.blobs import Blobs
from gossamer.store.catalog.errors import (
    AdapterCorrupt,
    BlobCorrupt,
    BlobStoreFailed,
    RegistryBusy,
)
from gossamer.store.catalog.opening import Store
from gossamer.store.failpoints import Failpoint
from gossamer.store.format import digest
from tests.store.support import (
    IMPATIENT,
    LINE,
    blob_path,
    check_nothing_is_left_over,
    flip_a_bit,
    make_digest,
    opened,
    push,
    push_file,
    read_file,
    rows,
    stored_blobs,
)


def blobs_of(store: Store) -> Blobs:
    return store.catalog._parts.blobs


def set_moving(data: Path) -> None:
    """What a crash leaves."""
    connection = sqlite3.connect(data / "registry.sqlite3")
    with connection:
        connection.execute("UPDATE blobs SET moving = 1")
    connection.close()


@pytest.mark.parametrize("operation", ["delete", "quarantine", "checkout"])
def test_others_write_while_bytes_are_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    with opened(tmp_path, busy_timeout_s=0.2) as store:
        version = push(store.catalog, "sql", 1)
        real, wrote = getattr(blobs_of(store), operation), list[str]()

        def slow(blob_id: str) -> Any:
            push(store.catalog, f"beside-{len(wrote)}", 2)
            wrote.append(blob_id)
            return real(blob_id)

        monkeypatch.setattr(blobs_of(store), operation, slow)
        if operation == "delete":
            store.catalog.delete("acme", "sql")
        else:
            flip_a_bit(blob_path(tmp_path, version.blob_id))
            with pytest.raises(AdapterCorrupt):
                store.catalog.open(version.digest)
        assert set(wrote) == {version.blob_id}
        assert version.blob_id not in stored_blobs(tmp_path)


@pytest.mark.parametrize("point", [Failpoint.DELETE_CLAIMED, Failpoint.DELETE_UNLINKED])
@pytest.mark.parametrize("what", ["adapter", "file"])
@pytest.mark.parametrize("same_process", [True, False])
def test_an_upload_of_bytes_that_go_waits_until_they_are_gone(
    tmp_path: Path, point: Failpoint, what: str, same_process: bool
) -> None:
    passed: list[str] = []
    threads: list[threading.Thread] = []

    def upload() -> None:
        if what == "adapter":
            push(other.catalog, "again", 1)
        else:
            push_file(other.files, "again", LINE)
        passed.append("uploaded")

    def between(at: Failpoint) -> None:
        if at is point and not threads:
            threads.append(threading.Thread(target=upload))
            threads[0].start()
            threads[0].join(0.3)
            passed.append("collected")

    with (
        opened(tmp_path, failpoint=between) as store,
        opened(tmp_path, owner=False) as another,
    ):
        other = store if same_process else another
        if what == "adapter":
            push(store.catalog, "sql", 1)
            store.catalog.delete("acme", "sql")
        else:
            store.files.delete("acme", push_file(store.files, "a", LINE).id)
        threads[0].join(10)
        assert passed == ["collected", "uploaded"]
        if what == "adapter":
            assert digest(store.catalog.open(make_digest(1))) == make_digest(1)
        else:
            (file,) = store.files.list("acme").items
            assert read_file(store.files, file) == LINE
    with opened(tmp_path, limits=IMPATIENT):
        check_nothing_is_left_over(tmp_path)


def test_an_upload_of_bytes_that_are_set_aside_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    with opened(tmp_path) as store, opened(tmp_path, owner=False) as worker:
        version = push(store.catalog, "sql", 1)
        flip_a_bit(blob_path(tmp_path, version.blob_id))
        rotten = blob_path(tmp_path, version.blob_id).read_bytes()
        real = blobs_of(store).quarantine

        def slow(blob_id: str) -> None:
            threads.append(threading.Thread(target=push, args=(worker.catalog, "sql", 1)))
            threads[0].start()
            threads[0].join(0.3)
            real(blob_id)

        monkeypatch.setattr(blobs_of(store), "quarantine", slow)
        with pytest.raises(AdapterCorrupt):
            store.catalog.open(version.digest)
        threads[0].join(10)
        assert store.catalog.show("acme", "sql").versions == (version,)
        assert digest(store.catalog.open(version.digest)) == version.digest
        assert (tmp_path / "store" / "quarantine" / version.blob_id).read_bytes() == rotten


def test_a_blob_that_cannot_be_removed_can_be_claimed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise BlobStoreFailed("delete a blob", "it is away")

    with opened(tmp_path) as store:
        version = push(store.catalog, "sql", 1)
        with monkeypatch.context() as patched:
            patched.setattr(blobs_of(store), "delete", fail)
            store.catalog.delete("acme", "sql")
        assert rows(tmp_path, "SELECT moving FROM blobs") == [(0,)]
        assert stored_blobs(tmp_path) == {version.blob_id}
        assert push(store.catalog, "sql", 1).number == 2
        assert digest(store.catalog.open(version.digest)) == version.digest


def test_two_do_not_remove_the_same_blob(tmp_path: Path) -> None:
    found: list[bool] = []

    def between(point: Failpoint) -> None:
        if point is Failpoint.DELETE_CLAIMED:
            found.append(store.catalog.recover().blobs > 0)

    with opened(tmp_path, failpoint=between) as store:
        push(store.catalog, "sql", 1)
        store.catalog.delete("acme", "sql")
        assert found == [False]
        check_nothing_is_left_over(tmp_path)


def test_what_a_crash_left_moving_does_not_stay_so(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        version = push(store.catalog, "sql", 1)
        set_moving(tmp_path)
        # a process that is no owner cannot know whether the owner is at it
        with (
            opened(tmp_path, owner=False, busy_timeout_s=0.2) as worker,
            pytest.raises(RegistryBusy),
        ):
            push(worker.catalog, "copy", 1)
        assert rows(tmp_path, "SELECT * FROM uploads") == []
        push(store.catalog, "copy", 1)
        assert rows(tmp_path, "SELECT moving FROM blobs") == [(0,)]
        set_moving(tmp_path)
    with opened(tmp_path) as store, opened(tmp_path, owner=False) as worker:
        assert rows(tmp_path, "SELECT moving FROM blobs") == [(0,)]
        assert push(worker.catalog, "third", 1).blob_id == version.blob_id
        assert digest(store.catalog.open(version.digest)) == version.digest


def test_a_blob_that_is_being_moved_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    with opened(tmp_path, busy_timeout_s=0.2) as store:
        version = push(store.catalog, "sql", 1)
        set_moving(tmp_path)
        with store.catalog._parts.moving.turn(version.blob_id) as mine:
            assert mine
            store.catalog.recover()
            assert rows(tmp_path, "SELECT moving FROM blobs") == [(1,)]
            with pytest.raises(RegistryBusy):
                push(store.catalog, "copy", 1)
        push(store.catalog, "copy", 1)


@pytest.mark.parametrize("when", ["before the look", "after it"])
def test_an_upload_that_mends_what_was_looked_at_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The damage was seen, but by the time that it is written down the bytes are whole again."""
    with opened(tmp_path) as store, opened(tmp_path, owner=False) as worker:
        version = push(store.catalog, "sql", 1)
        flip_a_bit(blob_path(tmp_path, version.blob_id))
        real, looks = blobs_of(store).checkout, [0]

        @contextmanager
        def checkout(blob_id: str) -> Iterator[Path]:
            looks[0] += 1
            if looks[0] == 2 and when == "before the look":
                push(worker.catalog, "copy", 1)
            with (
                raising(lambda: looks[0] == 2 and push(worker.catalog, "copy", 1)),
                real(blob_id) as path,
            ):
                yield path

        monkeypatch.setattr(blobs_of(store), "checkout", checkout)
        if when == "before the look":
            assert digest(store.catalog.open(version.digest)) == version.digest
        else:
            with pytest.raises(AdapterCorrupt):
                store.catalog.open(version.digest)
        assert set(rows(tmp_path, "SELECT status FROM versions")) == {("active",)}
        assert digest(store.catalog.open(version.digest)) == version.digest
        assert not list((tmp_path / "store" / "quarantine").iterdir())


@contextmanager
def raising(before: Callable[[], object]) -> Iterator[None]:
    """Do something before the news of damage arrives."""
    try:
        yield
    except BlobCorrupt:
        before()
        raise
