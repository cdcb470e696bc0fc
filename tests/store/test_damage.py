"""Disks that lie and disks that are full."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.store.catalog.errors import AdapterCorrupt, AdapterNotFound
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import VersionInfo
from gossamer.store.failpoints import Failpoint
from gossamer.store.format import digest
from tests.store.support import (
    ROOT,
    blob_path,
    flip_a_bit,
    make_digest,
    make_file,
    opened,
    push,
    rows,
    start_child,
    stored_blobs,
    temp_files,
)


def test_a_flipped_bit_is_found_and_the_version_quarantined(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    version, other = push(store.catalog, "sql", 1), push(store.catalog, "math", 2)
    flip_a_bit(blob_path(tmp_path, version.blob_id))
    with store.catalog.resolve("acme", ["sql"]) as in_flight, caplog.at_level(logging.ERROR):
        with pytest.raises(AdapterCorrupt) as caught:
            store.catalog.open(in_flight.versions[0].digest)
        assert caught.value.digest == version.digest
        assert "quarantined" in caplog.text
        with pytest.raises(AdapterCorrupt):  # and again: its hold still names it
            store.catalog.open(version.digest)
    assert [v.status for v in store.catalog.show("acme", "sql").versions] == ["corrupt"]
    with pytest.raises(AdapterNotFound):
        store.catalog.resolve("acme", ["sql"])
    assert (tmp_path / "store" / "quarantine" / version.blob_id).is_file()
    assert stored_blobs(tmp_path) == {other.blob_id}
    assert digest(store.catalog.open(other.digest)) == other.digest


def test_a_missing_blob_is_damage_too(store: Store, tmp_path: Path) -> None:
    version = push(store.catalog, "sql", 1)
    blob_path(tmp_path, version.blob_id).unlink()
    with pytest.raises(AdapterCorrupt, match="missing"), store.catalog.download("acme", "sql"):
        pass
    assert store.catalog.show("acme", "sql").versions[0].status == "corrupt"


def push_twice_and_damage(store: Store, data: Path) -> VersionInfo:
    """One file in two tenants' versions, found damaged; returns the first."""
    version = push(store.catalog, "sql", 1)
    push(store.catalog, "copy", 1, tenant="zeta")
    flip_a_bit(blob_path(data, version.blob_id))
    with pytest.raises(AdapterCorrupt):
        store.catalog.open(version.digest)
    return version


def test_every_version_of_a_damaged_blob_is_marked(store: Store, tmp_path: Path) -> None:
    push_twice_and_damage(store, tmp_path)
    assert store.catalog.show("zeta", "copy").versions[0].status == "corrupt"


def test_uploading_the_file_again_restores_it(store: Store, tmp_path: Path) -> None:
    version = push_twice_and_damage(store, tmp_path)
    assert push(store.catalog, "sql", 1) == version
    assert digest(store.catalog.open(version.digest)) == version.digest
    with store.catalog.resolve("zeta", ["copy"]):
        pass


def test_a_damaged_version_does_not_stop_the_next_one(store: Store, tmp_path: Path) -> None:
    version = push(store.catalog, "sql", 1)
    flip_a_bit(blob_path(tmp_path, version.blob_id))
    with pytest.raises(AdapterCorrupt):
        store.catalog.open(version.digest)
    assert push(store.catalog, "sql", 2).number == 2
    assert digest(store.catalog.open(make_digest(2))) == make_digest(2)
    store.catalog.delete("acme", "sql", 1)
    assert rows(tmp_path, "SELECT count(*) FROM blobs") == [(1,)]


def test_a_process_that_is_no_owner_marks_and_moves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path, owner=False) as store:
        version = push(store.catalog, "sql", 1)
        flip_a_bit(blob_path(tmp_path, version.blob_id))
        with pytest.raises(AdapterCorrupt):
            store.catalog.open(version.digest)
        assert store.catalog.show("acme", "sql").versions[0].status == "corrupt"
        assert stored_blobs(tmp_path) == {version.blob_id}


def test_damage_is_left_to_the_upload_that_is_mending_it(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        version = push(store.catalog, "sql", 1)
        flip_a_bit(blob_path(tmp_path, version.blob_id))
        seen: list[str] = []

        def between(point: Failpoint) -> None:
            if point is Failpoint.UPLOAD_STAGED:
                with pytest.raises(AdapterCorrupt):
                    store.catalog.open(version.digest)
                seen.append(store.catalog.show("acme", "sql").versions[0].status)

        with opened(tmp_path, owner=False, failpoint=between) as worker:
            push(worker.catalog, "copy", 1)
        assert seen == ["active"]
        assert digest(store.catalog.open(version.digest)) == version.digest


FILL = """
import resource, sys
from pathlib import Path
from gossamer.store.catalog.errors import StoreFull
from gossamer.store.catalog.opening import Store
from tests.store.support import BASE, make_file
with Store(Path(sys.argv[1]), BASE, owner=True) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        store.catalog.upload("acme", "sql", [make_file(2)])
    except StoreFull as error:
        print(error.where, error.why)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print(store.catalog.show("acme", "sql").current)
"""


def test_a_file_size_limit_is_reported_as_full(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        push(store.catalog, "sql", 1)
    child = start_child(FILL, tmp_path)
    output, errors = child.communicate(timeout=60)
    assert errors == ""
    assert output.splitlines() == ["blobs File too large", "1"]
    assert temp_files(tmp_path) == []
    assert len(stored_blobs(tmp_path)) == 1


SMALL_DISK = """
import sys
from pathlib import Path
from gossamer.store.catalog.errors import StoreFull
from gossamer.store.catalog.opening import Store
from gossamer.store.format import digest
from tests.store.support import BASE, make_file, stored_blobs, temp_files
data, reserve = Path(sys.argv[1]), int(sys.argv[2])
full = []
with Store(data, BASE, owner=True, reserve_bytes=reserve) as store:
    store.catalog.create_tenant("acme")
    kept = []
    for seed in range(2000):
        try:
            kept.append(store.catalog.upload("acme", f"a{seed % 90}", [make_file(seed)]).digest)
        except StoreFull as error:
            full.append(error.where)
            if len(full) == 3:
                break
    assert len(full) == 3 and kept, (full, len(kept))
    for wanted in kept:
        assert digest(store.catalog.open(wanted)) == wanted
    assert temp_files(data) == []
with Store(data, BASE, owner=True, reserve_bytes=reserve) as store:
    found = {v.digest for a in store.catalog.list("acme") for v in a.versions}
    assert found == set(kept), (len(found), len(kept))
    assert len(stored_blobs(data)) == len(found)
    if reserve:  # then there is room to make room
        for adapter in store.catalog.list("acme"):
            store.catalog.delete("acme", adapter.name)
if reserve:
    with Store(data, BASE, owner=True, reserve_bytes=reserve) as store:
        store.catalog.upload("acme", "again", [make_file(5000)])
print("survived", len(kept))
"""


@pytest.mark.parametrize("reserve", [0, 400_000])
def test_a_full_disk_loses_nothing_and_recovers(tmp_path: Path, reserve: int) -> None:
    """A real file system of 2 MiB, in a mount namespace of our own."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=2m none {disk}"
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system allows no user namespaces")
    victim = [sys.executable, "-c", SMALL_DISK, str(disk / "data"), str(reserve)]
    run = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", f'{mount} && exec "$@"', "sh", *victim],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("survived")


def test_files_are_as_large_as_these_tests_think() -> None:
    assert 1000 < len(make_file(2)) < 4096
