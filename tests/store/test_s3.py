"""Blobs in a bucket: what is kept there, what survives there, and what is said when it fails."""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest

from gossamer.store.blobs import RANGE_BYTES, RETRIES, Blobs, reach
from gossamer.store.catalog.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    BlobCorrupt,
    BlobStoreFailed,
    BlobsUrlInvalid,
)
from gossamer.store.catalog.opening import Store
from tests.s3 import KEY_ID, SECRET, S3Server
from tests.store.support import (
    IMPATIENT,
    LINE,
    make_file,
    opened,
    push,
    push_file,
    read_file,
    rows,
    start_child,
)

#: More than one range to read and more than two parts to write.
LARGE = bytes(range(251)) * ((RANGE_BYTES + (4 << 20)) // 251)


@pytest.fixture
def blobs(bucket: str, tmp_path: Path) -> Blobs:
    return Blobs(bucket, spool=tmp_path / "spool")


def put(blobs: Blobs, data: bytes) -> str:
    with blobs.spool() as spool:
        spool.write(data)
        return blobs.put(spool)


def write(server: S3Server, path: str, data: bytes) -> None:
    obstore.put(server.bucket("blobs"), path, data)


def read(server: S3Server, path: str) -> bytes:
    return bytes(obstore.get(server.bucket("blobs"), path).bytes())


def key(blob_id: str) -> str:
    return f"gossamer/blobs/{blob_id[:2]}/{blob_id}"


def statuses(data: Path) -> set[str]:
    return {status for (status,) in rows(data, "SELECT status FROM versions")}


def every_use(blobs: Blobs) -> list[Callable[[], object]]:
    """All that may be asked of blobs, of one that is not there."""
    missing = "0" * 64

    def checkout() -> None:
        with blobs.checkout(missing):
            pass

    return [
        lambda: put(blobs, b"x"),
        checkout,
        lambda: blobs.stat(missing),
        lambda: list(blobs.list()),
        lambda: blobs.delete(missing),
        lambda: blobs.quarantine(missing),
        blobs.check,
    ]


def fails(use: Callable[[], object]) -> str:
    """What a use that fails says; neither that nor its traceback holds a secret."""
    with pytest.raises(BlobStoreFailed) as failed:
        use()
    told = "".join(traceback.format_exception(failed.value))
    assert SECRET not in told
    assert KEY_ID not in told
    assert "\n" not in str(failed.value)
    assert "http" not in failed.value.why.replace("HTTP", ""), "no address for tenants"
    return failed.value.why


def test_a_large_blob_goes_in_parts_and_comes_in_ranges(
    blobs: Blobs, s3_server: S3Server, tmp_path: Path
) -> None:
    blob_id = put(blobs, LARGE)
    assert read(s3_server, key(blob_id)) == LARGE
    with blobs.checkout(blob_id) as path:
        assert path.parent == tmp_path / "spool"
        assert path.read_bytes() == LARGE
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
def test_damaged_bytes_are_never_handed_out(blobs: Blobs, s3_server: S3Server, damage: str) -> None:
    blob_id = put(blobs, b"\0" * 1000)
    damaged = {"flip": b"\1" + b"\0" * 999, "cut": b"\0" * 999, "grow": b"\0" * 1001}[damage]
    write(s3_server, key(blob_id), damaged)
    with pytest.raises(BlobCorrupt), blobs.checkout(blob_id):
        pass
    put(blobs, b"\0" * 1000)
    with blobs.checkout(blob_id) as path:
        assert path.read_bytes() == b"\0" * 1000


def test_more_blobs_than_a_page_of_the_list_holds(blobs: Blobs, s3_server: S3Server) -> None:
    ids = {f"{number:064x}" for number in range(1005)}
    others = [f"{folder}/" + "f" * 64 for folder in ("gossamer/quarantine", "another/blobs/ff")]
    store = s3_server.bucket("blobs")
    for path in [key(blob_id) for blob_id in ids] + others:
        obstore.put(store, path, b"x")
    assert {stat.blob_id for stat in blobs.list()} == ids


def test_adapters_and_files_live_in_the_bucket(
    bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    with opened(tmp_path, blobs_url=bucket) as store:
        version, file = push(store.catalog, "sql", 1), push_file(store.files, "a", LINE)
        assert read(s3_server, key(version.blob_id)) == make_file(1)
        assert store.catalog.open(version.digest).nnz == version.nnz
        assert read_file(store.files, file) == LINE
    assert list((tmp_path / "spool").iterdir()) == []
    assert not (tmp_path / "store").exists()
    with opened(tmp_path, blobs_url=bucket, limits=IMPATIENT) as store:
        assert store.catalog.open(version.digest).nnz == version.nnz
        store.catalog.delete("acme", "sql")
        store.files.delete("acme", file.id)
        assert store.catalog.recover().blobs == 0
    assert list(Blobs(bucket, spool=tmp_path / "spool").list()) == []


READ = """
import sys
from pathlib import Path
from gossamer.store.catalog.opening import Store
from tests.store.support import BASE, push
with Store(Path(sys.argv[1]), BASE, blobs_url=sys.argv[2]) as store:
    print(store.catalog.open(sys.argv[3]).nnz, push(store.catalog, "sql", 2).number)
"""


def test_another_process_reads_and_adds(bucket: str, tmp_path: Path) -> None:
    with opened(tmp_path, blobs_url=bucket) as store:
        version = push(store.catalog, "sql", 1)
        child = start_child(READ, tmp_path, bucket, version.digest)
        assert child.communicate(timeout=120) == (f"{version.nnz} 2\n", "")
        with store.catalog.resolve("acme", ["sql"]) as resolution:
            assert store.catalog.open(resolution.versions[0].digest).nnz > 0


def test_a_damaged_adapter_is_set_aside_and_comes_back(
    bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    with opened(tmp_path, blobs_url=bucket) as store:
        version = push(store.catalog, "sql", 1)
        write(s3_server, key(version.blob_id), b"rotten")
        with pytest.raises(AdapterCorrupt):
            store.catalog.open(version.digest)
        assert read(s3_server, f"gossamer/quarantine/{version.blob_id}") == b"rotten"
        with pytest.raises(AdapterNotFound):
            store.catalog.resolve("acme", ["sql"])
        push(store.catalog, "sql", 1)
        assert store.catalog.open(version.digest).nnz == version.nnz


def test_a_bucket_that_is_lost_costs_no_version(
    bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    with opened(tmp_path, blobs_url=bucket) as store:
        version = push(store.catalog, "sql", 1)
        s3_server.forget()
        assert "NoSuchBucket" in fails(lambda: store.catalog.open(version.digest))
        assert statuses(tmp_path) == {"active"}
        s3_server.make_bucket("blobs")
        write(s3_server, key(version.blob_id), make_file(1))
        assert store.catalog.open(version.digest).nnz == version.nnz


def test_a_bucket_that_is_not_there_is_no_empty_one(blobs: Blobs, s3_server: S3Server) -> None:
    s3_server.forget()
    for use in every_use(blobs):
        assert fails(use) == "it answered 404 Not Found, NoSuchBucket"


def test_credentials_that_are_refused(blobs: Blobs, s3_server: S3Server) -> None:
    with s3_server.demanding():
        for use in every_use(blobs):
            assert fails(use).startswith("it answered 403 Forbidden")
        assert "InvalidAccessKeyId" in fails(blobs.check)
    blobs.check()


def test_a_server_that_is_gone_is_reported_within_seconds(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    blobs = Blobs(bucket, spool=tmp_path)
    started = time.monotonic()
    for use in every_use(blobs)[:3]:
        assert "error sending request" in fails(use)
    assert time.monotonic() - started < 20


def connections(server: socket.socket) -> int:
    """How many wait to be accepted."""
    server.setblocking(False)
    count = 0
    while True:
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def test_a_server_that_never_answers_is_reported_too(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_TIMEOUT", "1 second")  # an operator's, in place of 30
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        fails(lambda: reach(bucket))
        assert time.monotonic() - started < 20
        assert connections(silent) <= 1 + RETRIES["max_retries"]


def test_a_store_opens_on_a_bucket_that_lets_it_in_only(
    bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    with pytest.raises(BlobStoreFailed), opened(tmp_path / "a", blobs_url="s3://nobody-made-it"):
        pass
    with s3_server.demanding(), pytest.raises(BlobStoreFailed), opened(tmp_path, blobs_url=bucket):
        pass
    with opened(tmp_path, blobs_url=bucket) as store:
        assert isinstance(store, Store)


def test_a_store_makes_nothing_for_a_url_that_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(BlobsUrlInvalid),
        opened(tmp_path / "data", blobs_url=f"s3://key:{SECRET}@blobs"),
    ):
        pass
    assert not (tmp_path / "data").exists()


def test_a_folder_named_by_url_is_reached_before_it_is_made(tmp_path: Path) -> None:
    reach((tmp_path / "blobs").as_uri())
    assert not (tmp_path / "blobs").exists()
    with opened(tmp_path / "data", blobs_url=(tmp_path / "blobs").as_uri()) as store:
        push(store.catalog, "sql", 1)
    assert (tmp_path / "blobs" / "blobs").is_dir()
