"""A data folder with files to train on, a backlog over it, and jobs to put in."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from gossamer.jobs.backlog import Backlog
from gossamer.jobs.requests import JobRequest
from gossamer.jobs.views import Claim, Job, JobLimits
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import StoreLimits
from gossamer.store.registry.database import Registry
from gossamer.store.registry.models import Model
from tests.store.support import BASE, LINE, Clock, make_file, opened, push_file

LEASE = 30.0
TENANTS = ("acme", "zeta")


@dataclass(frozen=True)
class Bench:
    """What the tests work with; `files` is each tenant's training file."""

    data: Path
    store: Store
    backlog: Backlog
    clock: Clock
    files: dict[str, str]

    def request(self, tenant: str = "acme", **fields: Any) -> JobRequest:
        """A request of its own, unless fields are given that make it equal to another."""
        given = {
            "method": "sparta",
            "training_file": self.files[tenant],
            "base_fingerprint": BASE.fingerprint,
            **fields,
        }
        return JobRequest.of(**given)

    def submit(self, tenant: str = "acme", **fields: Any) -> Job:
        """Submit a request; one without a seed gets the next, so that none repeats another."""
        if "seed" not in fields:
            fields["seed"] = count_rows(self.store.registry, "jobs")
        return self.backlog.submit(tenant, self.request(tenant, **fields))

    def claim(self, worker: str = "w1") -> Claim:
        """Claim; there must be something."""
        claim = self.backlog.claim(worker, LEASE)
        if claim is None:
            raise LookupError("nothing to claim")
        return claim

    def running(self, **fields: Any) -> Claim:
        """A job submitted and claimed."""
        self.submit(**fields)
        return self.claim()

    def get(self, job: Job | Claim, tenant: str = "acme") -> Job:
        """The job as it is now."""
        job_id = job.job.id if isinstance(job, Claim) else job.id
        return self.backlog.get(tenant, job_id)

    def messages(self, job: Job | Claim, tenant: str = "acme") -> list[str]:
        """What its log says, oldest first."""
        job_id = job.job.id if isinstance(job, Claim) else job.id
        page = self.backlog.events(tenant, job_id, limit=100_000, order="asc")
        return [e.message for e in page.items]

    def finish(self, claim: Claim, seed: int = 1) -> None:
        """Register a version as the claim's result."""
        self.store.catalog.upload(
            claim.job.tenant,
            claim.job.adapter,
            [make_file(seed)],
            also=self.backlog.finishing(claim),
        )


@functools.cache
def _template() -> tempfile.TemporaryDirectory[str]:
    """A data folder as `benched` describes it, to be copied: migrating takes longer than most tests
    (0.15 s). It goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="gossamer-jobs-")
    with opened(Path(folder.name), TENANTS) as store:
        for tenant in TENANTS:
            push_file(store.files, "a.jsonl", LINE, tenant)
    return folder


@contextmanager
def benched(
    data: Path,
    limits: JobLimits | None = None,
    *,
    limits_of_store: StoreLimits | None = None,
    **options: Any,
) -> Iterator[Bench]:
    """An open data folder with the tenants acme and zeta, each with a file."""
    if "database_url" not in options and not (data / "registry.sqlite3").exists():
        shutil.copytree(_template().name, data, dirs_exist_ok=True)
    with opened(data, TENANTS, limits=limits_of_store, **options) as store:
        clock = Clock()
        for tenant in TENANTS:
            if not store.files.list(tenant).items:
                push_file(store.files, "a.jsonl", LINE, tenant)
        files = {t: store.files.list(t).items[0].id for t in TENANTS}
        yield Bench(data, store, Backlog(store.registry, clock=clock, limits=limits), clock, files)


def count_rows(registry: Registry, table: str) -> int:
    """How many rows a table has."""
    with registry.read() as session:
        return session.execute(
            sa.select(sa.func.count()).select_from(Model.metadata.tables[table])
        ).scalar_one()


def everything(registry: Registry) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, without how many uploads have begun: refused ones count too."""
    tables = {
        name: [column for column in table.columns if (name, column.name) != ("blobs", "claims")]
        for name, table in Model.metadata.tables.items()
    }
    with registry.read() as session:
        return {
            name: sorted((tuple(row) for row in session.execute(sa.select(*columns))), key=repr)
            for name, columns in tables.items()
        }
