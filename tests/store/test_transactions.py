"""What another room writes with an upload: both are there in the end, or neither is."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import FileInfo, VersionInfo
from gossamer.store.registry.models import Tenant
from tests.store.support import BASE, LINE, filenames, meaning, push, push_file, rows, stored_blobs


def _refuse(session: Session, uploaded: VersionInfo | FileInfo) -> None:
    session.add(Tenant(name="half", created_at=datetime.now(UTC)))
    session.flush()
    raise LookupError(uploaded.blob_id)


# ---- with a version


def _note(session: Session, version: VersionInfo) -> None:
    label = version.label.replace(":", ".").replace("@", ".")
    session.add(Tenant(name=f"{label}.{version.current}".lower(), created_at=datetime.now(UTC)))


@pytest.mark.parametrize("activate", [True, False])
def test_what_is_written_also_is_written_with_the_version(catalog: Catalog, activate: bool) -> None:
    push(catalog, "sql", 1)
    push(catalog, "sql", 2, activate=activate, also=_note)
    assert f"sql.2.{activate}".lower() in catalog.tenants()


def test_it_is_written_when_the_upload_repeats_a_version_too(catalog: Catalog) -> None:
    push(catalog, "sql", 1)
    assert push(catalog, "sql", 1, also=_note).number == 1
    push(catalog, "sql", 2, tag="step-4")
    push(catalog, "sql", 2, tag="step-4", also=_note)
    assert {"sql.1.true", "sql.step-4.false"} <= set(catalog.tenants())


@pytest.mark.parametrize("options", [{}, {"tag": "step-4"}, {"activate": False}])
def test_if_that_fails_there_is_no_version(
    store: Store, tmp_path: Path, options: dict[str, Any]
) -> None:
    push(store.catalog, "sql", 1)
    kept = push(store.catalog, "sql", 2, tag="step-4")
    before = rows(tmp_path, "SELECT * FROM adapters"), rows(tmp_path, "SELECT * FROM versions")
    blobs = stored_blobs(tmp_path)
    for name in ("sql", "new"):
        with pytest.raises(LookupError):
            push(store.catalog, name, 3, also=_refuse, **options)
    after = rows(tmp_path, "SELECT * FROM adapters"), rows(tmp_path, "SELECT * FROM versions")
    assert after == before
    assert "half" not in store.catalog.tenants()
    assert stored_blobs(tmp_path) == blobs
    assert rows(tmp_path, "SELECT * FROM uploads") == []
    assert meaning(store.catalog, "sql@step-4") == kept.digest


def test_a_repeated_upload_whose_rest_fails_moves_no_pointer(catalog: Catalog) -> None:
    first = push(catalog, "sql", 1)
    push(catalog, "sql", 2, activate=False)
    with pytest.raises(LookupError):
        push(catalog, "sql", 2, also=_refuse)
    assert meaning(catalog, "sql") == first.digest


def test_what_a_failed_upload_leaves_in_another_process_recover_removes(
    store: Store, tmp_path: Path
) -> None:
    with Store(tmp_path, BASE) as worker, pytest.raises(LookupError):
        push(worker.catalog, "sql", 1, also=_refuse)
    assert len(stored_blobs(tmp_path)) == 1
    assert store.catalog.recover().blobs == 1
    assert stored_blobs(tmp_path) == set()
    assert rows(tmp_path, "SELECT * FROM blobs") == []


# ---- with a file


def test_what_is_written_also_is_written_with_the_file(store: Store, tmp_path: Path) -> None:
    told: list[FileInfo] = []

    def also(session: Session, file: FileInfo) -> None:
        told.append(file)
        session.add(Tenant(name=f"of-{file.id}", created_at=datetime.now(UTC)))

    file = push_file(store.files, "a", LINE, also=also)
    assert told == [file]
    assert f"of-{file.id}" in store.catalog.tenants()


def test_if_that_fails_there_is_no_file(store: Store, tmp_path: Path) -> None:
    with pytest.raises(LookupError):
        push_file(store.files, "a", LINE, also=_refuse)
    assert filenames(store.files) == []
    assert "half" not in store.catalog.tenants()
    assert stored_blobs(tmp_path) == set()
    assert rows(tmp_path, "SELECT id FROM blobs UNION ALL SELECT id FROM uploads") == []
