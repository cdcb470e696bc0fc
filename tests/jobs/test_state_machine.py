"""The backlog beside a model of it in plain dictionaries, under random orders of random calls."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from gossamer.jobs.errors import CancelRequested, JobStateError, LeaseLost
from gossamer.jobs.views import Claim, JobError, JobLimits
from gossamer.store.catalog.views import VersionInfo
from tests.jobs.support import LEASE, benched, everything
from tests.store.support import BASE

TENANTS = ("acme", "zeta")
WORKERS = ("w1", "w2")
MAX_ATTEMPTS = 3
FINISHED = ("succeeded", "failed", "cancelled")


@dataclass
class Model:
    """What a job must be."""

    tenant: str
    order: int
    status: str = "queued"
    wanted: str | None = None
    attempt: int = 0
    fence: int = 0
    turn: datetime | None = None
    lease_until: datetime | None = None

    def expired(self, now: datetime) -> bool:
        return self.status == "running" and self.lease_until is not None and self.lease_until <= now

    def settle(self) -> None:
        self.status = {"cancel": "cancelled", "pause": "paused", None: "queued"}[self.wanted]
        self.wanted = None


def version_of(claim: Claim) -> VersionInfo:
    """What the catalog would say of the claim's result."""
    return VersionInfo(
        tenant=claim.job.tenant,
        name=claim.job.adapter,
        number=1,
        tag=None,
        digest="sha256:" + "0" * 64,
        blob_id="0" * 64,
        nbytes=1,
        nnz=1,
        density=1.0,
        modules=(),
        record={},
        warnings=(),
        base_fingerprint=BASE.fingerprint,
        base_verified=True,
        status="active",
        created_at=datetime.now().astimezone(),
        current=True,
    )


class BacklogMachine(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="gossamer-machine-")
        limits = JobLimits(unfinished=1000, max_attempts=MAX_ATTEMPTS)
        self.opened = ExitStack()
        self.bench = self.opened.enter_context(benched(Path(self.folder.name), limits))
        self.clock, self.backlog = self.bench.clock, self.bench.backlog
        self.registry = self.bench.store.registry
        self.models: dict[str, Model] = {}
        self.claims: list[Claim] = []
        for tenant in ("acme", "acme", "zeta"):
            self.submit(tenant)

    def teardown(self) -> None:
        if hasattr(self, "opened"):
            self.check_logs()
            self.opened.close()
            self.folder.cleanup()

    def check_logs(self) -> None:
        """Numbered without gaps, and the metrics of the one step written once."""
        for job_id, model in self.models.items():
            events = self.backlog.events(model.tenant, job_id, limit=1000, order="asc").items
            assert [int(e.id[-8:], 16) for e in events] == list(range(1, len(events) + 1))
            assert sum(e.kind == "metrics" for e in events) <= 1

    # One rule, for Hypothesis switches rules off at random and a run without claims, or with ten
    # times as many submissions, meets no zombie.
    @rule(
        kind=st.sampled_from(
            ["submit", "steer", "claim", "claim", "claim", "work", "work", "work"]
        ),
        tenant=st.sampled_from(TENANTS),
        worker=st.sampled_from(WORKERS),
        wait=st.sampled_from([0.0, 0.0, 1.0, LEASE / 2, LEASE - 0.5, LEASE]),
        age=st.integers(1, 4),
        action=st.sampled_from(["cancel", "pause", "resume", "resume"]),
        what=st.sampled_from(["beat", "log", "fail", "succeed", "release", "pause", "cancel"]),
    )
    def step(
        self, kind: str, tenant: str, worker: str, wait: float, age: int, action: str, what: str
    ) -> None:
        """Something happens, after a while, to a job or a claim that is not old."""
        self.clock.advance(wait)
        if kind == "submit":
            self.submit(tenant)
        elif kind == "steer":
            self.steer(list(self.models)[-min(age, len(self.models))], action)
        elif kind == "claim":
            self.claim(worker)
        elif self.claims:
            self.work(self.claims[-min(age, len(self.claims))], what)

    # ---- tenants

    def submit(self, tenant: str) -> None:
        job = self.backlog.submit(tenant, self.bench.request(tenant, seed=len(self.models)))
        self.models[job.id] = Model(tenant, len(self.models))

    def steer(self, job: str, action: str) -> None:
        model = self.models[job]
        refused = model.status in FINISHED or model.wanted == "cancel"
        if action == "cancel":
            refused = model.status in ("succeeded", "failed")
        if not refused:
            self.expect(model, action)
        try:
            getattr(self.backlog, action)(model.tenant, job)
        except JobStateError:
            assert refused
        else:
            assert not refused

    def expect(self, model: Model, action: str) -> None:
        if action == "resume":
            model.wanted = None
            if model.status == "paused":
                model.status = "queued"
        elif model.status not in (f"{action}d", f"{action}led"):
            model.wanted = action
            if model.status != "running" or model.expired(self.clock.now):
                model.settle()

    # ---- workers

    def claim(self, worker: str) -> None:
        now = self.clock.now
        for model in self.models.values():
            if model.expired(now) and model.wanted is not None:
                model.settle()
            elif model.expired(now) and model.attempt >= MAX_ATTEMPTS:
                model.status = "failed"
        claim = self.backlog.claim(worker, LEASE)
        expected = self.next_job(now)
        assert (None if claim is None else claim.job.id) == expected
        if claim is None or expected is None:
            return
        model = self.models[expected]
        model.status, model.turn, model.lease_until = (
            "running",
            now,
            now + timedelta(seconds=LEASE),
        )
        model.attempt += 1
        assert claim.fence > model.fence
        model.fence = claim.fence
        self.claims.append(claim)

    def next_job(self, now: datetime) -> str | None:
        live = [m for m in self.models.values() if m.status == "running" and not m.expired(now)]
        turns = {
            tenant: max(
                (m.turn for m in self.models.values() if m.tenant == tenant and m.turn),
                default=datetime.min.replace(tzinfo=now.tzinfo),
            )
            for tenant in TENANTS
        }
        claimable = [
            (sum(o.tenant == m.tenant for o in live), turns[m.tenant], m.order, job)
            for job, m in self.models.items()
            if m.status == "queued" or m.expired(now)
        ]
        return min(claimable)[3] if claimable else None

    def work(self, claim: Claim, what: str) -> None:
        """Write something as the worker; a zombie is refused and must have changed nothing."""
        model = self.models[claim.job.id]
        if model.status != "running" or model.fence != claim.fence:
            before = everything(self.registry)
            with pytest.raises(LeaseLost):
                self.write(claim, what)
            assert everything(self.registry) == before
        elif what == "succeed" and model.wanted == "cancel":
            with pytest.raises(CancelRequested):
                self.write(claim, what)
        elif what != "cancel" or model.wanted == "cancel":
            self.write(claim, what)
            self.expect_of_work(model, what)

    def write(self, claim: Claim, what: str) -> None:
        if what == "beat":
            self.backlog.heartbeat(claim, LEASE)
        elif what == "log":
            self.backlog.event(claim, "info", "x", {"step": 1})
        elif what == "fail":
            self.backlog.fail(claim, JobError("x", "x"))
        elif what == "succeed":
            with self.registry.write() as session:
                self.backlog.finishing(claim)(session, version_of(claim))
        elif what == "release":
            self.backlog.release(claim)
        else:
            {"pause": self.backlog.paused, "cancel": self.backlog.cancelled}[what](claim)

    def expect_of_work(self, model: Model, what: str) -> None:
        if what == "beat":
            model.lease_until = self.clock.now + timedelta(seconds=LEASE)
        elif what in ("fail", "succeed"):
            model.status = "failed" if what == "fail" else "succeeded"
            model.wanted = None
        elif what in ("release", "pause"):
            model.attempt -= 1
            model.turn = None if what == "release" else model.turn
            model.settle()
        elif what == "cancel":
            model.settle()

    # ---- what always holds

    @invariant()
    def the_jobs_are_as_in_the_model(self) -> None:
        if not hasattr(self, "models"):
            return
        found = {j.id: j for t in TENANTS for j in self.backlog.list(t, limit=1000).items}
        assert found.keys() == self.models.keys()
        for job_id, model in self.models.items():
            job = found[job_id]
            assert (job.status, job.wanted, job.attempt) == (
                model.status,
                model.wanted,
                model.attempt,
            )
            assert (job.finished_at is not None) == (job.status in FINISHED)
            assert (job.version is not None) == (job.status == "succeeded")
            assert (job.error is not None) == (job.status == "failed")


def run(examples: int) -> None:
    run_state_machine_as_test(
        BacklogMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            # Shrinking replays hundreds of runs of half a second each; the steps are printed as is.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_backlog_agrees_with_its_model() -> None:
    run(10)


@pytest.mark.gate
@pytest.mark.timeout(1200)
def test_the_backlog_agrees_with_its_model_for_long() -> None:
    run(200)
