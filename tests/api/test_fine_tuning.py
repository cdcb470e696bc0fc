"""Training jobs over HTTP, by OpenAI's client; a hand does what their worker would."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from prometheus_client.parser import text_string_to_metric_families

from gossamer.api.metrics import FINISHED, UNFINISHED
from gossamer.jobs.views import JobError, Progress, Status
from tests.api.hand import LEASE, Hand, at_hand, base_of, carry_out_elsewhere
from tests.api.running import Running, running
from tests.api.tuning import Tenant

MOST_JOBS = 30


@pytest.fixture(scope="module")
def server(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of our own: a hand that claims the next job wants no other tests' in the queue."""
    limits = {"jobs_per_tenant": MOST_JOBS}
    with running(api_base, tmp_path_factory.mktemp("tuning"), limits) as server:
        yield server


@pytest.fixture(scope="module")
def hand(server: Running) -> Iterator[Hand]:
    with at_hand(server.services.settings.data_dir, base_of(server)) as hand:
        yield hand


@pytest.fixture
def tenant(server: Running, request: pytest.FixtureRequest) -> Iterator[Tenant]:
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()
    yield Tenant(server, name)
    backlog = server.services.backlog
    for job in backlog.list(name, limit=1000).items:
        if job.status in UNFINISHED:
            backlog.cancel(name, job.id)


def test_the_life_of_a_job(server: Running, tenant: Tenant, hand: Hand) -> None:
    """Followed by its events, tried at a checkpoint, and asked as soon as it has succeeded."""
    job: Any = tenant.create({"method": "lota"}, suffix="rows", metadata={"run": "1"})
    assert job.progress is None
    claim = hand.claim(job.id)
    hand.backlog.heartbeat(
        claim, LEASE, Progress(2, 8, loss=1.5, trained_tokens=20, remaining_s=60)
    )
    hand.backlog.event(claim, "info", "Step 2 of 8.", {"step": 2, "train_loss": 1.5})
    job = tenant.jobs.retrieve(job.id)
    FineTuningJob.model_validate(job.to_dict())
    assert (job.status, job.trained_tokens) == ("running", None)
    assert job.progress == {"step": 2, "steps": 8, "loss": 1.5, "trained_tokens": 20}
    assert 0 < job.estimated_finish - time.time() <= 60
    with pytest.raises(openai.NotFoundError):
        tenant.text("rows")  # nothing half-made is there

    half = hand.checkpoint(claim, 4, server.make_file(41), {"step": 4, "train_loss": 1.25})
    (checkpoint,) = tenant.jobs.checkpoints.list(job.id)
    FineTuningJobCheckpoint.model_validate(checkpoint.to_dict())
    assert checkpoint.fine_tuned_model_checkpoint == half.label == "rows@step-4"
    assert (checkpoint.step_number, checkpoint.metrics.train_loss) == (4, 1.25)
    assert checkpoint.fine_tuning_job_id == job.id
    tried = tenant.text(checkpoint.fine_tuned_model_checkpoint)

    result = hand.attach(claim, "metrics.csv", b"step,train_loss\n2,1.5\n")
    hand.finish(claim, server.make_file(42), trained_tokens=80)
    succeeded = time.monotonic()
    job = tenant.jobs.retrieve(job.id)
    assert (job.status, job.fine_tuned_model, job.version) == ("succeeded", "rows", "rows:1")
    made = tenant.text(job.fine_tuned_model)
    assert time.monotonic() - succeeded < 5
    FineTuningJob.model_validate(job.to_dict())
    assert len({made, tried, tenant.text("base")}) == 3
    assert (job.trained_tokens, job.error, job.estimated_finish) == (80, None, None)
    assert job.created_at <= job.started_at <= job.finished_at
    assert job.result_files == [result.id]
    assert tenant.client.files.content(result.id).read().startswith(b"step,train_loss")
    assert {m.id for m in tenant.client.models.list()} == {"base", "rows"}

    events = list(tenant.jobs.list_events(job.id, limit=2))
    for event in events:
        FineTuningJobEvent.model_validate(event.to_dict())
        assert event.object == "fine_tuning.job.event"
    metrics = [event for event in events if event.type == "metrics"]
    assert [event.data for event in metrics] == [{"step": 2, "train_loss": 1.5}]
    assert "succeeded" in events[0].message
    assert "queued" in events[-1].message
    oldest_first = tenant.jobs.list_events(job.id, extra_query={"order": "asc"})
    assert [e.id for e in oldest_first] == [e.id for e in reversed(events)]
    news = tenant.jobs.list_events(job.id, after=events[2].id, extra_query={"order": "asc"})
    assert [e.id for e in news] == [events[1].id, events[0].id]


def test_a_job_of_another_process_makes_the_name_s_next_version(
    server: Running, tenant: Tenant, tmp_path: Path
) -> None:
    """And the very next request runs with it."""
    server.upload("sql", 51, tenant.key)
    before = tenant.text("sql")
    assert tenant.text("sql") == before  # resident, and its prefix is cached
    job = tenant.create(suffix="sql")
    adapter = tmp_path / "made.safetensors"
    adapter.write_bytes(server.make_file(52))
    carry_out_elsewhere(server, job.id, adapter)
    after = tenant.text("sql")
    assert after != before
    assert after == tenant.text("sql:2")
    assert tenant.text("sql:1") == before
    done: Any = tenant.jobs.retrieve(job.id)
    assert (done.status, done.version) == ("succeeded", "sql:2")


def test_a_job_without_a_suffix_gets_a_name(tenant: Tenant, server: Running, hand: Hand) -> None:
    job = tenant.create()
    hand.finish(hand.claim(job.id), server.make_file(61))
    name = tenant.jobs.retrieve(job.id).fine_tuned_model
    assert name is not None
    assert job.to_dict()["adapter_name"] == name
    assert tenant.text(name)


def test_a_failed_job_says_which_field_and_which_line(tenant: Tenant, hand: Hand) -> None:
    job = tenant.create()
    message = "Line 3 of a.jsonl is not JSON."
    hand.backlog.fail(
        hand.claim(job.id), JobError("invalid_training_file", message, "training_file")
    )
    failed = tenant.jobs.retrieve(job.id)
    FineTuningJob.model_validate(failed.to_dict())
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert failed.error.message == message
    assert failed.fine_tuned_model is None
    assert failed.finished_at is not None
    (newest,) = tenant.jobs.list_events(job.id, limit=1).data
    assert (newest.level, message in newest.message) == ("error", True)


def test_a_queued_job_is_steered_at_once(tenant: Tenant, hand: Hand) -> None:
    job = tenant.create(suffix="mine")
    for action, status in (
        ("pause", "paused"),
        ("pause", "paused"),
        ("resume", "queued"),
        ("resume", "queued"),
        ("pause", "paused"),
        ("cancel", "cancelled"),
        ("cancel", "cancelled"),
    ):
        assert getattr(tenant.jobs, action)(job.id).status == status, action
    for action in ("pause", "resume"):
        with pytest.raises(openai.ConflictError) as refused:
            getattr(tenant.jobs, action)(job.id)
        assert refused.value.code == "invalid_job_state"
        assert refused.value.response.headers["x-should-retry"] == "false"
    assert hand.backlog.claim("by-hand", LEASE) is None


def test_a_running_job_is_steered_by_its_worker(
    tenant: Tenant, server: Running, hand: Hand
) -> None:
    job: Any = tenant.create(suffix="mine")
    claim = hand.claim(job.id)
    job = tenant.jobs.pause(job.id)
    assert (job.status, job.wanted) == ("running", "pause")
    assert hand.backlog.heartbeat(claim, LEASE) == "pause"
    hand.backlog.paused(claim)
    job = tenant.jobs.retrieve(job.id)
    assert (job.status, job.wanted) == ("paused", None)
    assert tenant.jobs.resume(job.id).status == "queued"
    claim = hand.claim(job.id)
    job = tenant.jobs.cancel(job.id)
    assert (job.status, job.wanted) == ("running", "cancel")
    hand.backlog.cancelled(claim)
    job = tenant.jobs.retrieve(job.id)
    FineTuningJob.model_validate(job.to_dict())
    assert (job.status, job.fine_tuned_model) == ("cancelled", None)
    with pytest.raises(openai.NotFoundError):
        tenant.text("mine")


def test_many_checkpoints_in_pages(tenant: Tenant, server: Running, hand: Hand) -> None:
    claim = hand.claim(tenant.create(suffix="steps").id)
    for step in (1, 2, 3, 10, 20):
        hand.checkpoint(claim, step, server.make_file(step), {"step": step})
    job_id = claim.job.id
    pages = tenant.jobs.checkpoints.list(job_id, limit=2)
    assert (len(pages.data), pages.has_more) == (2, True)
    found = list(pages)
    assert [c.step_number for c in found] == [20, 10, 3, 2, 1]
    rest = tenant.jobs.checkpoints.list(job_id, after=found[2].id)
    assert [c.step_number for c in rest] == [2, 1]
    for listing in (tenant.jobs.checkpoints.list, tenant.jobs.list_events):
        with pytest.raises(openai.BadRequestError) as refused:
            listing(job_id, after="ftckpt-000000000000000000000000")
        assert refused.value.param == "after"


def test_a_tenant_may_have_so_many_unfinished_jobs(tenant: Tenant) -> None:
    made = [tenant.create(seed=i).id for i in range(MOST_JOBS)]
    with pytest.raises(openai.RateLimitError) as full:
        tenant.create(seed=MOST_JOBS)
    assert (full.value.code, full.value.type) == ("insufficient_quota", "insufficient_quota")
    assert full.value.response.headers["x-should-retry"] == "false"
    assert tenant.create(seed=0).id == made[0]  # the same request is no job more
    tenant.jobs.cancel(made[3])
    assert tenant.create(seed=MOST_JOBS).status == "queued"


def test_jobs_are_counted_by_state(server: Running, tenant: Tenant, hand: Hand) -> None:
    assert set(UNFINISHED) | set(FINISHED) == set(get_args(Status)) - {"validating_files"}

    def counts() -> dict[str, float]:
        with server.http("") as http:
            families = text_string_to_metric_families(http.get("/metrics").text)
        return {
            sample.labels["status"]: sample.value
            for family in families
            if family.name in ("gossamer_jobs", "gossamer_jobs_finished")
            for sample in family.samples
            if sample.name in ("gossamer_jobs", "gossamer_jobs_finished_total")
        }

    before = counts()
    assert set(before) == set(UNFINISHED) | set(FINISHED)
    hand.finish(hand.claim(tenant.create(seed=0).id), server.make_file(99))
    hand.claim(tenant.create(seed=1).id)
    tenant.create(seed=2)
    tenant.jobs.pause(tenant.create(seed=3).id)
    tenant.jobs.cancel(tenant.create(seed=4).id)
    after = counts()
    grown = {status: after[status] - before[status] for status in after}
    assert grown == {
        "queued": 1, "running": 1, "paused": 1, "succeeded": 1, "failed": 0, "cancelled": 1,
    }  # fmt: skip
