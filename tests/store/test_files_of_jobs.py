"""Files that training jobs use: who may open them, and how long they stay."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from gossamer.store.catalog.errors import FileNotFound
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import FileInfo, FileUsage
from gossamer.store.registry.job_models import FINISHED, PAUSED, QUEUED, RUNNING, Job
from gossamer.store.registry.models import File
from tests.store.support import BASE, LINE, push_file, read_file, stored_blobs

NOW = datetime(2030, 1, 1, tzinfo=UTC)


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


def test_a_job_opens_no_other_tenants_file(store: Store) -> None:
    theirs = push_file(store.files, "secret", LINE, tenant="zeta")
    job = add_job(store, theirs)
    with pytest.raises(FileNotFound):
        read_file(store.files, theirs, "acme", job=job)


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
        read_file(store.files, file)
    with Store(tmp_path, BASE) as worker:
        assert read_file(worker.files, file, job=job) == LINE
        with pytest.raises(FileNotFound):
            read_file(worker.files, file, job="ftjob-" + "0" * 24)
    assert store.files.usage("acme") == FileUsage(0, 0)
    finish_jobs(store)
    with pytest.raises(FileNotFound):
        read_file(store.files, file, job=job)
    assert store.catalog.recover().blobs == 1
    assert stored_blobs(tmp_path) == set()


@pytest.mark.parametrize("status", FINISHED)
def test_a_finished_job_keeps_nothing(store: Store, tmp_path: Path, status: str) -> None:
    file = push_file(store.files, "a", LINE)
    add_job(store, file, status=status)
    store.files.delete("acme", file.id)
    assert stored_blobs(tmp_path) == set()
