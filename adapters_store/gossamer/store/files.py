"""The one door to tenants' files at rest: the data that jobs train on, and the results they report.

    upload  a filled spool → stage → put → register
    use     list, get, content
    delete  a tombstone; the bytes go when nothing needs them

Files lie in the same blobs as adapters and by the same rules: a blob is named by its bytes, shared
by whatever says the same, and unlinked in the server process only. A file that an unfinished job
uses keeps its bytes after its deletion.

Everything here blocks and may be called from any thread. `tenant` is taken as true, and nothing of
another tenant is ever read, or denied in other words than what does not exist.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gossamer.store.catalog.claims import abandon, claim, settle
from gossamer.store.catalog.collecting import Collector
from gossamer.store.catalog.errors import (
    BlobCorrupt,
    BlobMissing,
    FileCorrupt,
    FileNotFound,
    InvalidFilename,
    QuotaExceeded,
)
from gossamer.store.catalog.holds import Held
from gossamer.store.catalog.moving import waiting_for_moves
from gossamer.store.catalog.needs import is_a_files
from gossamer.store.catalog.parts import Parts
from gossamer.store.catalog.removing import collect_quietly, set_aside
from gossamer.store.catalog.views import Direction, FileInfo, FileUsage, Page, Purpose
from gossamer.store.failpoints import Failpoint
from gossamer.store.registry.job_models import FINISHED, Job
from gossamer.store.registry.models import File, Tenant
from gossamer.store.registry.tenants import lock_tenant, tenant_id
from gossamer.store.spool import Spool

MAX_FILENAME = 255
#: what counts against the quota: the tenant's own, not what jobs write for it
COUNTED: Purpose = "fine-tune"
_FILE_ID = re.compile(r"file-[0-9a-f]{24}")

#: What another room writes in the transaction that makes a file visible, told of the file.
Also = Callable[[Session, FileInfo], None]


class Files:
    """Files by tenant and id. Made by the catalog, whose blobs, limits and holds it shares."""

    def __init__(self, parts: Parts, collector: Collector) -> None:
        self._parts = parts
        self._collector = collector

    def spool(self) -> Spool:
        """A temp file for an upload, capped at `StoreLimits.training_file_bytes`: write to it, then
        pass it to `upload`, then discard it (or use it as a context). Any process."""
        return self._parts.blobs.spool(self._parts.limits.training_file_bytes)

    def upload(
        self,
        tenant: str,
        filename: str,
        purpose: Purpose,
        spool: Spool,
        *,
        also: Also | None = None,
    ) -> FileInfo:
        """Keep the spooled bytes as a new file. What they say is not looked at.

        Durable, and visible to every process, when this returns; if it raises, nothing changed.
        Any process. Equal files share one blob, across tenants, and are files of their own.

        Args:
            tenant: an existing tenant.
            filename: 1 to 255 characters, none of them a control character.
            purpose: `fine-tune` counts against the tenant's quota.
            spool: filled; from `Files.spool`, or any of the same blobs.
            also: called with the session and the file inside the registering transaction; if it
                raises, so does `upload`. Keep it short.

        Raises:
            InvalidFilename, TenantNotFound
            QuotaExceeded, StoreFull, RegistryBusy, BlobStoreFailed, UploadInterrupted
        """
        _check_filename(filename)
        spool.seal()
        parts = self._parts
        upload_id, blob_id = secrets.token_hex(16), spool.blob_id
        waiting_for_moves(parts.registry, lambda: self._stage(tenant, purpose, spool, upload_id))
        parts.failpoint(Failpoint.FILE_STAGED)
        try:
            parts.blobs.put(spool)
            with parts.registry.write() as session:
                owner = lock_tenant(session, tenant)
                settle(session, upload_id, blob_id, filename)
                self._check_quota(session, owner, purpose, blob_id, spool.size)
                row = File(
                    public_id=f"file-{secrets.token_hex(12)}",
                    tenant_id=owner.id,
                    filename=filename,
                    purpose=purpose,
                    blob_id=blob_id,
                    nbytes=spool.size,
                    created_at=parts.clock(),
                )
                session.add(row)
                session.flush()
                info = _info(row, tenant)
                if also is not None:
                    also(session, info)
                    session.flush()
                parts.failpoint(Failpoint.FILE_REGISTERING)
        except BaseException:
            abandon(parts, upload_id, blob_id)
            raise
        parts.failpoint(Failpoint.FILE_REGISTERED)
        return info

    def _stage(self, tenant: str, purpose: Purpose, spool: Spool, upload_id: str) -> None:
        parts, blob_id = self._parts, spool.blob_id
        with parts.registry.write() as session:
            owner = lock_tenant(session, tenant)
            self._check_quota(session, owner, purpose, blob_id, spool.size)
            claim(parts, session, upload_id, blob_id, spool.size, parts.clock())
            parts.failpoint(Failpoint.FILE_STAGING)

    def list(
        self,
        tenant: str,
        *,
        purpose: Purpose | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: Direction = "desc",
    ) -> Page[FileInfo]:
        """A tenant's files in the order of their uploads, newest first unless `order` is `asc`.

        Args:
            purpose: these only.
            after: the id of the last file of the page before; it may be deleted by now.
            limit: the most files of this page, from 1.

        Raises:
            FileNotFound: `after` is no file of the tenant, and never was.
        """
        with self._parts.registry.read() as session:
            query = _of(tenant).where(File.deleted_at.is_(None))
            if purpose is not None:
                query = query.where(File.purpose == purpose)
            newest_first = order == "desc"
            if after is not None:
                cursor = find_file(session, tenant, after, deleted=True).id
                query = query.where(File.id < cursor if newest_first else File.id > cursor)
            query = query.order_by(File.id.desc() if newest_first else File.id).limit(limit + 1)
            found = [_info(row, tenant) for row in session.execute(query).scalars()]
        return Page(tuple(found[:limit]), has_more=len(found) > limit)

    def get(self, tenant: str, file_id: str) -> FileInfo:
        """One file. Any process.

        Raises:
            FileNotFound: unknown, deleted, or another tenant's.
        """
        with self._parts.registry.read() as session:
            return _info(find_file(session, tenant, file_id), tenant)

    def delete(self, tenant: str, file_id: str) -> None:
        """Delete a file; durable when this returns. Any process.

        Its bytes go at once if nothing needs them, else when the last reader or the last job is
        done with them; in a process that is no owner they go when the server next collects.

        Raises:
            FileNotFound, TenantNotFound, RegistryBusy
        """
        parts = self._parts
        with parts.registry.write() as session:
            lock_tenant(session, tenant)
            row = find_file(session, tenant, file_id)
            row.deleted_at = parts.clock()
            session.flush()
            parts.failpoint(Failpoint.FILE_TOMBSTONING)
        parts.failpoint(Failpoint.FILE_TOMBSTONED)
        collect_quietly(parts, row.blob_id)

    @contextmanager
    def content(self, tenant: str, file_id: str, *, job: str | None = None) -> Iterator[Path]:
        """The file's bytes, verified, as a local path that is good until the context ends. Read
        only: it may be the stored blob itself.

        In the server process a hold keeps the bytes meanwhile. A worker is another process and
        knows of no holds: there the unfinished job that it works for keeps them.

        Args:
            job: the id of a job of the tenant that is not finished and uses the file: then the
                file is found even if it was deleted meanwhile.

        Raises:
            FileNotFound: unknown, deleted, or another tenant's.
            FileCorrupt: the bytes are damaged or gone.
            RegistryBusy, BlobStoreFailed
        """
        held = self._hold(tenant, file_id, job)
        try:
            with self._verified(held) as path:
                yield path
        finally:
            self._collector.give_back([held])

    def usage(self, tenant: str) -> FileUsage:
        """How much of its quota of files a tenant uses. Any process."""
        with self._parts.registry.read() as session:
            return _usage(session, tenant_id(session, tenant))

    def _hold(self, tenant: str, file_id: str, job: str | None) -> Held:
        holds = self._parts.holds
        while True:
            generation = holds.generation()
            with self._parts.registry.read() as session:
                row = find_file(session, tenant, file_id, job=job)
            held = Held(row.public_id, row.blob_id)
            if holds.take([held], generation):
                return held

    @contextmanager
    def _verified(self, held: Held) -> Iterator[Path]:
        file_id, blob_id = held
        with ExitStack() as stack:
            try:
                path = stack.enter_context(self._parts.blobs.checkout(blob_id))
            except (BlobCorrupt, BlobMissing):
                why = set_aside(self._parts, blob_id, file_id)
                if why is not None:
                    with self._parts.registry.read() as session:
                        if not is_a_files(session, blob_id):
                            raise FileNotFound(file_id) from None
                    raise FileCorrupt(file_id, why) from None
                path = stack.enter_context(self._parts.blobs.checkout(blob_id))
            yield path

    def _check_quota(
        self, session: Session, owner: Tenant, purpose: Purpose, blob_id: str, nbytes: int
    ) -> None:
        """Refuse one more file if it would pass the tenant's limits; its row is locked."""
        if purpose != COUNTED:
            return
        limits, usage = self._parts.limits, _usage(session, owner.id)
        mine = _counted(owner.id).where(File.blob_id == blob_id).limit(1)
        has_blob = session.execute(mine).first() is not None
        wanted = usage.file_bytes + (0 if has_blob else nbytes)
        if usage.files + 1 > limits.files:
            raise QuotaExceeded("files", usage.files + 1, limits.files)
        if wanted > limits.file_bytes:
            raise QuotaExceeded("file bytes", wanted, limits.file_bytes)


def _of(tenant: str, file_id: str | None = None) -> sa.Select[File]:
    """A tenant's files, deleted ones too, or the one of that id."""
    query = sa.select(File).join(Tenant, Tenant.id == File.tenant_id).where(Tenant.name == tenant)
    return query if file_id is None else query.where(File.public_id == file_id)


def find_file(
    session: Session,
    tenant: str,
    file_id: str,
    *,
    job: str | None = None,
    deleted: bool = False,
) -> File:
    """The row of a tenant's file: not deleted, or needed by the unfinished job of that id, or
    `deleted` as well.

    Raises:
        FileNotFound
    """
    usable: sa.ColumnElement[bool] = sa.true() if deleted else File.deleted_at.is_(None)
    if job is not None:
        needed = sa.exists().where(
            Job.public_id == job,
            Job.status.not_in(FINISHED),
            sa.or_(Job.training_file_id == File.id, Job.validation_file_id == File.id),
        )
        usable = sa.or_(usable, needed)
    row = None
    if _FILE_ID.fullmatch(file_id):  # a database does not take every text
        row = session.execute(_of(tenant, file_id).where(usable)).scalar_one_or_none()
    if row is None:
        raise FileNotFound(file_id)
    return row


def _counted(tenant: int | None) -> sa.Select[str, int]:
    return sa.select(File.blob_id, File.nbytes).where(
        File.tenant_id == tenant, File.deleted_at.is_(None), File.purpose == COUNTED
    )


def _usage(session: Session, tenant: int | None) -> FileUsage:
    counted = _counted(tenant).subquery()
    number = session.execute(sa.select(sa.func.count()).select_from(counted)).scalar_one()
    distinct = sa.select(counted.c.blob_id, counted.c.nbytes).distinct().subquery()
    total = sa.select(sa.func.coalesce(sa.func.sum(distinct.c.nbytes), 0))
    return FileUsage(number, int(session.execute(total).scalar_one()))


def _info(row: File, tenant: str) -> FileInfo:
    return FileInfo(
        id=row.public_id,
        tenant=tenant,
        filename=row.filename,
        purpose=cast(Purpose, row.purpose),
        nbytes=row.nbytes,
        blob_id=row.blob_id,
        created_at=row.created_at,
    )


def _check_filename(name: str) -> None:
    if not 1 <= len(name) <= MAX_FILENAME:
        raise InvalidFilename(name, f"it needs 1 to {MAX_FILENAME} characters")
    # Control characters and lone surrogates: no database takes them all, and no log line should.
    if any(unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in name):
        raise InvalidFilename(name, "it has control characters")
