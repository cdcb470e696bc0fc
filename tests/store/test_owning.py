"""Blobs belong to one registry: who else comes is sent away before anything is lost."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import NotSupportedError

from gossamer.store.blobs import Blobs
from gossamer.store.catalog.errors import BlobsNotOurs
from gossamer.store.catalog.owning import check_owner
from gossamer.store.registry.database import Registry
from tests.s3 import S3Server
from tests.store.support import (
    IMPATIENT,
    blob_path,
    flip_a_bit,
    make_digest,
    opened,
    push,
    race,
    rows,
    stored_blobs,
)

OTHER = "s3://blobs/another"


def mark_of(data: Path) -> str:
    ((mark,),) = rows(data, "SELECT id FROM identity")
    return str(mark)


def forget_identity(data: Path) -> None:
    """Make a registry as it was before there were marks."""
    connection = sqlite3.connect(data / "registry.sqlite3")
    with connection:
        connection.execute("DELETE FROM identity")
    connection.close()


def keys(server: S3Server) -> set[str]:
    return {
        meta["path"] for batch in obstore.list(server.bucket("blobs")) for meta in batch
    }  # fmt: skip


def refused(data: Path, *parts: str, **options: Any) -> None:
    """Neither the server nor another process may open it, and both are told the same."""
    for owner in (True, False):
        with (
            pytest.raises(BlobsNotOurs) as caught,
            opened(data, owner=owner, limits=IMPATIENT, **options),
        ):
            pass
        for part in parts:
            assert part in str(caught.value)
        assert caught.value.mark == mark_of(data)


def test_a_bucket_is_marked_with_the_registry_that_it_belongs_to(
    bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    for owner in (False, True, False):
        with opened(tmp_path, blobs_url=bucket, owner=owner):
            pass
        data = obstore.get(s3_server.bucket("blobs"), "gossamer/owner").bytes()
        assert bytes(data).decode() == mark_of(tmp_path)


def test_two_servers_on_one_bucket_lose_nothing(
    bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    with opened(tmp_path / "one", blobs_url=bucket) as one:
        version = push(one.catalog, "sql", 1)
        before = keys(s3_server)
        refused(tmp_path / "two", "another one", mark_of(tmp_path / "one"), blobs_url=bucket)
        assert keys(s3_server) == before
        assert one.catalog.open(version.digest).nnz == version.nnz


def test_a_wrong_prefix_and_an_emptied_bucket_cost_no_version(
    bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    with opened(tmp_path, blobs_url=bucket) as store:
        version = push(store.catalog, "sql", 1)
    refused(tmp_path, "none of the 1 blobs", blobs_url=OTHER)
    assert {key.partition("/")[0] for key in keys(s3_server)} == {"gossamer"}
    with opened(tmp_path, blobs_url=bucket) as store:
        assert store.catalog.open(version.digest).nnz == version.nnz
    s3_server.forget()
    s3_server.make_bucket("blobs")
    refused(tmp_path, "none of the 1 blobs", blobs_url=bucket)
    assert rows(tmp_path, "SELECT status FROM versions") == [("active",)]


def test_what_was_made_before_there_were_marks_is_taken_over(
    bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    for data, url in ((tmp_path / "a", None), (tmp_path / "b", bucket)):
        with opened(data, blobs_url=url) as store:
            version = push(store.catalog, "sql", 1)
        forget_identity(data)
        if url is None:
            (data / "store" / "owner").unlink()
        else:
            obstore.delete(s3_server.bucket("blobs"), "gossamer/owner")
        with opened(data, blobs_url=url) as store:
            assert store.catalog.open(version.digest).nnz == version.nnz
    assert (tmp_path / "a" / "store" / "owner").read_text() == mark_of(tmp_path / "a")
    assert bytes(obstore.get(s3_server.bucket("blobs"), "gossamer/owner").bytes()).decode() == (
        mark_of(tmp_path / "b")
    )


def test_blobs_of_nobody_known_are_left_alone(
    bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    with opened(tmp_path / "old", blobs_url=bucket) as store:
        push(store.catalog, "sql", 1)
    obstore.delete(s3_server.bucket("blobs"), "gossamer/owner")
    before = keys(s3_server)
    refused(tmp_path / "new", "1 blobs that the registry does not know", blobs_url=bucket)
    assert keys(s3_server) == before


def test_who_knows_better_writes_the_mark(bucket: str, s3_server: S3Server, tmp_path: Path) -> None:
    with opened(tmp_path, blobs_url=bucket) as store:
        push(store.catalog, "sql", 1)
    obstore.put(s3_server.bucket("blobs"), "another/owner", f"{mark_of(tmp_path)}\n".encode())
    with opened(tmp_path, blobs_url=OTHER) as store:
        assert push(store.catalog, "sql", 1).number == 1
    obstore.put(s3_server.bucket("blobs"), "another/owner", b"x" * 1000)
    refused(tmp_path, "another one", blobs_url=OTHER)


def test_a_registry_that_was_lost_or_mixed_up_costs_no_blob(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for data, seed in ((one, 1), (two, 2)):
        with opened(data) as store:
            push(store.catalog, "sql", seed)
    kept = stored_blobs(one)
    shutil.move(one / "registry.sqlite3", tmp_path / "safe")
    refused(one, "another one")
    assert stored_blobs(one) == kept
    shutil.copy(two / "registry.sqlite3", one / "registry.sqlite3")
    refused(one, "another one")
    assert stored_blobs(one) == kept
    shutil.copy(tmp_path / "safe", one / "registry.sqlite3")
    with opened(one, limits=IMPATIENT) as store:
        assert store.catalog.open(make_digest(1)).nnz


def test_a_folder_that_is_not_mounted_costs_no_version(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        push(store.catalog, "sql", 1)
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    refused(tmp_path, "none of the 1 blobs")
    shutil.rmtree(tmp_path / "store")
    shutil.move(tmp_path / "elsewhere", tmp_path / "store")
    with opened(tmp_path) as store:
        assert store.catalog.open(make_digest(1)).nnz


def test_damage_that_is_known_keeps_nobody_out(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        version = push(store.catalog, "sql", 1)
        flip_a_bit(blob_path(tmp_path, version.blob_id))
        with pytest.raises(Exception, match="damaged"):
            store.catalog.open(version.digest)
    forget_identity(tmp_path)
    (tmp_path / "store" / "owner").unlink()
    with opened(tmp_path) as store:
        assert push(store.catalog, "sql", 1) == version


START = """
import sys
from pathlib import Path
from gossamer.store.catalog.opening import Store
from tests.store.support import BASE
print("ready", flush=True)
input()
with Store(Path(sys.argv[1]), BASE, busy_timeout_s=60):
    print((Path(sys.argv[1]) / "store" / "owner").read_text())
"""


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    printed = race(START, tmp_path)
    assert {text.strip() for text in printed} == {mark_of(tmp_path)}


def test_of_two_registries_that_mark_at_once_one_comes_first(tmp_path: Path, bucket: str) -> None:
    for url in ((tmp_path / "store").as_uri(), bucket):
        blobs = Blobs(url, spool=tmp_path / "spool")
        blobs.claim("a" * 32)
        blobs.claim("b" * 32)
        assert blobs.owner() == "a" * 32
    assert [path.name for path in (tmp_path / "spool").iterdir()] == []


def test_file_systems_without_links_and_buckets_without_conditions(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = obstore.put

    def unconditional(*args: Any, mode: str | None = None, **options: Any) -> object:
        if mode is not None:
            raise NotSupportedError("conditional put")
        return put(*args, **options)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(obstore, "put", unconditional)
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite3'}")
    registry.migrate()
    for url in ((tmp_path / "store").as_uri(), bucket):
        blobs = Blobs(url, spool=tmp_path / "spool")
        for _ in range(2):
            check_owner(registry, blobs)
        assert blobs.owner() == mark_of(tmp_path)
    registry.close()
