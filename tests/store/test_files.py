"""Tenants' files: upload, read, list, and whom they count for."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gossamer.store.catalog.errors import (
    CatalogError,
    FileNotFound,
    InvalidFilename,
    QuotaExceeded,
    TenantNotFound,
    UploadInterrupted,
    UploadTooLarge,
)
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import FileUsage, StoreLimits
from gossamer.store.failpoints import Failpoint
from tests.store.support import (
    BASE,
    FILE_DELETE_POINTS,
    FILE_UPLOAD_POINTS,
    LINE,
    Clock,
    filenames,
    opened,
    push_file,
    read_file,
    rows,
    stored_blobs,
    temp_files,
)

# ---- upload and read


def test_an_upload_tells_what_it_keeps(store: Store, tmp_path: Path) -> None:
    file = push_file(store.files, "zażółć.jsonl", LINE)
    assert file.id.startswith("file-")
    assert len(file.id) == len("file-") + 24
    assert (file.tenant, file.filename, file.purpose) == ("acme", "zażółć.jsonl", "fine-tune")
    assert file.nbytes == len(LINE)
    assert file.blob_id == hashlib.sha256(LINE).hexdigest()
    assert file.created_at.utcoffset() is not None
    assert store.files.get("acme", file.id) == file
    assert read_file(store.files, file) == LINE
    assert temp_files(tmp_path) == []
    assert rows(tmp_path, "SELECT * FROM uploads") == []


def test_what_is_uploaded_survives_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        file = push_file(store.files, "a.jsonl", LINE)
    with opened(tmp_path) as store:
        assert read_file(store.files, file) == LINE


def test_a_process_that_is_no_owner_reads_and_writes(store: Store, tmp_path: Path) -> None:
    file = push_file(store.files, "a.jsonl", LINE)
    with Store(tmp_path, BASE) as worker:
        assert read_file(worker.files, file) == LINE
        result = push_file(worker.files, "r.csv", b"step\n", purpose="fine-tune-results")
    assert read_file(store.files, result) == b"step\n"


@pytest.mark.parametrize("name", ["", "a" * 256, "a\nb", "a\0b", "a\ud800b", "a\u2028b"])
def test_a_file_name_that_is_none_is_refused(store: Store, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidFilename):
        push_file(store.files, name, LINE)
    assert stored_blobs(tmp_path) == set()


def test_an_upload_for_nobody_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(TenantNotFound):
        push_file(store.files, "a", LINE, tenant="nobody")
    assert stored_blobs(tmp_path) == set()
    assert rows(tmp_path, "SELECT * FROM uploads") == []


def test_a_spool_for_files_has_their_cap(tmp_path: Path) -> None:
    with (
        opened(tmp_path, limits=StoreLimits(training_file_bytes=10)) as store,
        pytest.raises(UploadTooLarge) as caught,
    ):
        push_file(store.files, "a", b"x" * 11)
    assert caught.value.limit == 10


def test_uploads_and_deletes_pass_their_failpoints_in_order(tmp_path: Path) -> None:
    seen: list[Failpoint] = []
    with opened(tmp_path, failpoint=seen.append) as store:
        store.files.delete("acme", push_file(store.files, "a", LINE).id)
    assert seen == [*FILE_UPLOAD_POINTS, *FILE_DELETE_POINTS]


def test_an_upload_that_stood_still_past_the_grace_is_refused(tmp_path: Path) -> None:
    clock, stores = Clock(), list[Store]()

    def stand_still(point: Failpoint) -> None:
        if point is Failpoint.UPLOAD_STORED:
            clock.advance(7200)
            stores[0].catalog.recover()

    with opened(tmp_path, clock=clock, failpoint=stand_still) as opened_store:
        stores.append(opened_store)
        with pytest.raises(UploadInterrupted):
            push_file(opened_store.files, "a", LINE)
        assert filenames(opened_store.files) == []


# ---- list


def test_a_list_comes_in_pages_either_way(store: Store) -> None:
    files = [push_file(store.files, f"{i}.jsonl", LINE) for i in range(5)]
    assert filenames(store.files) == ["4.jsonl", "3.jsonl", "2.jsonl", "1.jsonl", "0.jsonl"]
    page = store.files.list("acme", limit=2, order="asc")
    assert ([f.id for f in page.items], page.has_more) == ([f.id for f in files[:2]], True)
    store.files.delete("acme", files[1].id)  # the cursor itself may go
    assert filenames(store.files, after=files[1].id, order="asc") == [
        "2.jsonl",
        "3.jsonl",
        "4.jsonl",
    ]
    last = store.files.list("acme", after=files[2].id, limit=1)
    assert ([f.id for f in last.items], last.has_more) == ([files[0].id], False)


def test_a_list_can_be_of_one_purpose(store: Store) -> None:
    push_file(store.files, "data", LINE)
    push_file(store.files, "result", LINE, purpose="fine-tune-results")
    assert filenames(store.files, purpose="fine-tune") == ["data"]
    assert filenames(store.files, purpose="fine-tune-results") == ["result"]


# ---- isolation


NO_IDS = ["", "file-", "file-" + "f" * 24, "../x", "file-" + "F" * 24, "a" * 5000, "\0", "\ud800"]


def test_no_operation_tells_another_tenants_file_from_a_missing_one(store: Store) -> None:
    theirs = push_file(store.files, "secret", LINE, tenant="zeta").id
    deleted = push_file(store.files, "gone", LINE).id
    store.files.delete("acme", deleted)
    operations: list[Callable[[str], object]] = [
        lambda file_id: store.files.get("acme", file_id),
        lambda file_id: store.files.delete("acme", file_id),
        lambda file_id: store.files.content("acme", file_id).__enter__(),
        lambda file_id: store.files.content("acme", file_id, job="ftjob-x").__enter__(),
    ]
    for operation in operations:
        answers = set()
        for file_id in (theirs, deleted, *NO_IDS):
            with pytest.raises(FileNotFound) as caught:
                operation(file_id)
            assert caught.value.given == file_id
            assert len(str(caught.value)) < 400
            if file_id in (theirs, deleted):
                answers.add(str(caught.value).replace(file_id, "ID"))
        assert len(answers) == 1
    with pytest.raises(FileNotFound):
        store.files.list("acme", after=theirs)
    assert filenames(store.files) == []
    assert read_file(store.files, theirs, "zeta") == LINE


# ---- quota


def test_the_quota_counts_training_files_and_their_distinct_bytes(store: Store) -> None:
    push_file(store.files, "a", LINE)
    twin = push_file(store.files, "b", LINE)
    push_file(store.files, "c", LINE * 2)
    push_file(store.files, "r", LINE * 3, purpose="fine-tune-results")
    push_file(store.files, "z", LINE * 4, tenant="zeta")
    assert store.files.usage("acme") == FileUsage(3, 3 * len(LINE))
    store.files.delete("acme", twin.id)
    assert store.files.usage("acme") == FileUsage(2, 3 * len(LINE))
    assert store.files.usage("nobody") == FileUsage(0, 0)


def test_a_full_quota_refuses_and_keeps_nothing(tmp_path: Path) -> None:
    limits = StoreLimits(files=2, file_bytes=len(LINE) * 3)
    with opened(tmp_path, limits=limits) as store:
        push_file(store.files, "a", LINE)
        with pytest.raises(QuotaExceeded, match="delete a file first") as caught:
            push_file(store.files, "b", LINE * 3)
        assert (caught.value.what, caught.value.wanted) == ("file bytes", 4 * len(LINE))
        push_file(store.files, "c", LINE)  # its bytes are there
        with pytest.raises(QuotaExceeded) as caught:
            push_file(store.files, "d", LINE)
        assert (caught.value.what, caught.value.wanted, caught.value.limit) == ("files", 3, 2)
        push_file(store.files, "r", LINE * 9, purpose="fine-tune-results")
        assert stored_blobs(tmp_path) == {
            hashlib.sha256(data).hexdigest() for data in (LINE, LINE * 9)
        }
        assert rows(tmp_path, "SELECT * FROM uploads") == []


def test_twenty_parallel_uploads_never_pass_the_quota(tmp_path: Path) -> None:
    with opened(tmp_path, limits=StoreLimits(files=7), busy_timeout_s=60) as store:
        barrier = threading.Barrier(20)

        def one(i: int) -> object:
            barrier.wait()
            try:
                return push_file(store.files, "a", LINE * (i + 1))
            except CatalogError as error:
                return error

        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(one, range(20)))
        assert sum(isinstance(a, QuotaExceeded) for a in answers) == 13
        assert store.files.usage("acme").files == 7
        assert len(stored_blobs(tmp_path)) == 7
