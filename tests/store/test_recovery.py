"""The one owner of a data folder, and what its recovery removes and what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.store.catalog.errors import (
    AdapterNotFound,
    AlreadyOwned,
    NotOwner,
    UploadInterrupted,
)
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import StoreLimits
from gossamer.store.failpoints import Failpoint
from tests.store.support import BASE, IMPATIENT, Clock, opened, push, rows, stored_blobs


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
    with opened(tmp_path, limits=IMPATIENT):
        assert stored_blobs(tmp_path) == set()
        assert rows(tmp_path, "SELECT * FROM blobs") == []
