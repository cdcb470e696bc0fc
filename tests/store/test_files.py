"""Tenants' files: upload, list, read, delete, quota; and whom their blobs belong to."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from gossamer.store.catalog.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    CatalogError,
    FileCorrupt,
    FileNotFound,
    InvalidFilename,
    NotOwner,
    QuotaExceeded,
    TenantNotFound,
    UploadInterrupted,
    UploadTooLarge,
)
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.removing import collect
from gossamer.store.catalog.views import FileInfo, FileUsage, StoreLimits
from gossamer.store.failpoints import Failpoint
from gossamer.store.files import Files
from gossamer.store.registry.job_models import FINISHED, PAUSED, QUEUED, RUNNING, Job
from gossamer.store.registry.models import File, Tenant
from tests.store.support import (
    BASE,
    Clock,
    blob_path,
    make_digest,
    make_file,
    opened,
    push,
    push_file,
    rows,
    stored_blobs,
    temp_files,
)

LINE = b'{"prompt": "a", "completion": "b"}\n'
NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with opened(tmp_path, ("acme", "zeta")) as store:
        yield store


def read(files: Files, file: FileInfo | str, tenant: str = "acme", **options: Any) -> bytes:
    file_id = file if isinstance(file, str) else file.id
    with files.content(tenant, file_id, **options) as path:
        return path.read_bytes()


def names(files: Files, **options: Any) -> list[str]:
    return [f.filename for f in files.list("acme", **options).items]


def add_job(
    store: Store, file: FileInfo, *, status: str = QUEUED, as_validation: bool = False
) -> str:
    """A job that uses the file, past the backlog, which is another room's; returns its id."""
    with store.registry.write() as session:
        row = session.query(File).filter_by(public_id=file.id).one()
        job = Job(
            public_id=f"ftjob-{row.id:024x}",
            tenant_id=row.tenant_id,
            status=status,
            request={},
            request_digest="",
            seed=0,
            adapter="a",
            base_fingerprint="",
            training_file_id=row.id,
            created_at=NOW,
            attempt=0,
            fence=0,
            last_event=0,
            kept_events=0,
            result_files=[],
        )
        if as_validation:
            other = File(
                public_id="file-" + "0" * 24,
                tenant_id=row.tenant_id,
                filename="other",
                purpose="fine-tune",
                blob_id="",
                nbytes=0,
                created_at=NOW,
                deleted_at=NOW,
            )
            session.add(other)
            session.flush()
            job.training_file_id, job.validation_file_id = other.id, row.id
        session.add(job)
    return job.public_id


def finish_jobs(store: Store, status: str = FINISHED[0]) -> None:
    with store.registry.write() as session:
        for job in session.query(Job):
            job.status = status


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
    assert read(store.files, file) == LINE
    assert temp_files(tmp_path) == []
    assert rows(tmp_path, "SELECT * FROM uploads") == []


def test_what_is_uploaded_survives_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        file = push_file(store.files, "a.jsonl", LINE)
    with opened(tmp_path) as store:
        assert read(store.files, file) == LINE


def test_a_process_that_is_no_owner_reads_and_writes(store: Store, tmp_path: Path) -> None:
    file = push_file(store.files, "a.jsonl", LINE)
    with Store(tmp_path, BASE) as worker:
        assert read(worker.files, file) == LINE
        result = push_file(worker.files, "r.csv", b"step\n", purpose="fine-tune-results")
    assert read(store.files, result) == b"step\n"


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
    assert seen == [
        Failpoint.UPLOAD_SPOOLING,
        Failpoint.UPLOAD_SPOOLED,
        Failpoint.UPLOAD_SYNCED,
        Failpoint.FILE_STAGING,
        Failpoint.FILE_STAGED,
        Failpoint.UPLOAD_RENAMED,
        Failpoint.UPLOAD_STORED,
        Failpoint.FILE_REGISTERING,
        Failpoint.FILE_REGISTERED,
        Failpoint.FILE_TOMBSTONING,
        Failpoint.FILE_TOMBSTONED,
        Failpoint.DELETE_CLAIMED,
        Failpoint.DELETE_UNLINKED,
        Failpoint.DELETE_COLLECTED,
    ]


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
        assert names(opened_store.files) == []


# ---- list


def test_a_list_comes_in_pages_either_way(store: Store) -> None:
    files = [push_file(store.files, f"{i}.jsonl", LINE) for i in range(5)]
    assert names(store.files) == ["4.jsonl", "3.jsonl", "2.jsonl", "1.jsonl", "0.jsonl"]
    page = store.files.list("acme", limit=2, order="asc")
    assert ([f.id for f in page.items], page.has_more) == ([f.id for f in files[:2]], True)
    store.files.delete("acme", files[1].id)  # the cursor itself may go
    assert names(store.files, after=files[1].id, order="asc") == ["2.jsonl", "3.jsonl", "4.jsonl"]
    last = store.files.list("acme", after=files[2].id, limit=1)
    assert ([f.id for f in last.items], last.has_more) == ([files[0].id], False)


def test_a_list_can_be_of_one_purpose(store: Store) -> None:
    push_file(store.files, "data", LINE)
    push_file(store.files, "result", LINE, purpose="fine-tune-results")
    assert names(store.files, purpose="fine-tune") == ["data"]
    assert names(store.files, purpose="fine-tune-results") == ["result"]


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
    assert names(store.files) == []
    assert read(store.files, theirs, "zeta") == LINE


def test_a_job_opens_no_other_tenants_file(store: Store) -> None:
    theirs = push_file(store.files, "secret", LINE, tenant="zeta")
    job = add_job(store, theirs)
    with pytest.raises(FileNotFound):
        read(store.files, theirs, "acme", job=job)


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


# ---- whose blob it is


def test_equal_files_share_a_blob_until_the_last_one_goes(store: Store, tmp_path: Path) -> None:
    mine, theirs = push_file(store.files, "a", LINE), push_file(store.files, "b", LINE, "zeta")
    assert stored_blobs(tmp_path) == {mine.blob_id}
    store.files.delete("acme", mine.id)
    assert read(store.files, theirs, "zeta") == LINE
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
        assert read(store.files, file) == make_file(1)
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


@pytest.mark.parametrize("status", [QUEUED, RUNNING, PAUSED])
@pytest.mark.parametrize("as_validation", [False, True], ids=["training", "validation"])
def test_a_file_that_an_unfinished_job_uses_outlives_its_deletion(
    store: Store, tmp_path: Path, status: str, as_validation: bool
) -> None:
    file = push_file(store.files, "a", LINE)
    job = add_job(store, file, status=status, as_validation=as_validation)
    store.files.delete("acme", file.id)
    store.catalog.recover()
    with pytest.raises(FileNotFound):
        store.files.get("acme", file.id)
    with pytest.raises(FileNotFound):
        read(store.files, file)
    with Store(tmp_path, BASE) as worker:
        assert read(worker.files, file, job=job) == LINE
        with pytest.raises(FileNotFound):
            read(worker.files, file, job="ftjob-" + "0" * 24)
    assert store.files.usage("acme") == FileUsage(0, 0)
    finish_jobs(store)
    with pytest.raises(FileNotFound):
        read(store.files, file, job=job)
    assert store.catalog.recover().blobs == 1
    assert stored_blobs(tmp_path) == set()


@pytest.mark.parametrize("status", FINISHED)
def test_a_finished_job_keeps_nothing(store: Store, tmp_path: Path, status: str) -> None:
    file = push_file(store.files, "a", LINE)
    add_job(store, file, status=status)
    store.files.delete("acme", file.id)
    assert stored_blobs(tmp_path) == set()


# ---- damage


def damage(tmp_path: Path, blob_id: str, how: str) -> None:
    path = blob_path(tmp_path, blob_id)
    if how == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "changed"])
def test_damage_is_found_and_the_same_bytes_mend_it(store: Store, tmp_path: Path, how: str) -> None:
    file = push_file(store.files, "a", LINE)
    damage(tmp_path, file.blob_id, how)
    with pytest.raises(FileCorrupt, match=how) as caught:
        read(store.files, file)
    assert caught.value.file_id == file.id
    with pytest.raises(FileCorrupt):  # and again
        read(store.files, file)
    assert store.files.get("acme", file.id) == file
    assert (tmp_path / "store" / "quarantine" / file.blob_id).exists() == (how == "changed")
    push_file(store.files, "b", LINE)
    assert read(store.files, file) == LINE


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
        read(store.files, file)
    assert store.catalog.show("acme", "sql").versions[0].status == "corrupt"
    with pytest.raises(AdapterNotFound):
        store.catalog.resolve("acme", ["sql"])
    push_file(store.files, "b", make_file(1))
    assert store.catalog.open(make_digest(1)).nnz == version.nnz
    assert read(store.files, file) == make_file(1)


def test_a_deleted_file_that_a_reader_finds_gone_is_not_found(store: Store, tmp_path: Path) -> None:
    file = push_file(store.files, "a", LINE)
    with Store(tmp_path, BASE) as other:  # its reads are no holds of the owner's
        held = other.files._hold("acme", file.id, None)
        store.files.delete("acme", file.id)
        with pytest.raises(FileNotFound), other.files._verified(held):
            pass
        other.files._collector.give_back([held])


# ---- in one transaction


def test_what_is_written_also_is_written_with_the_file(store: Store, tmp_path: Path) -> None:
    told: list[FileInfo] = []

    def also(session: Session, file: FileInfo) -> None:
        told.append(file)
        session.add(Tenant(name=f"of-{file.id}", created_at=NOW))

    file = push_file(store.files, "a", LINE, also=also)
    assert told == [file]
    assert f"of-{file.id}" in store.catalog.tenants()


def test_if_that_fails_there_is_no_file(store: Store, tmp_path: Path) -> None:
    def also(session: Session, file: FileInfo) -> None:
        session.add(Tenant(name="half", created_at=NOW))
        session.flush()
        raise LookupError(file.id)

    with pytest.raises(LookupError):
        push_file(store.files, "a", LINE, also=also)
    assert names(store.files) == []
    assert "half" not in store.catalog.tenants()
    assert stored_blobs(tmp_path) == set()
    assert rows(tmp_path, "SELECT * FROM blobs UNION ALL SELECT * FROM uploads") == []
