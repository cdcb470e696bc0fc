"""Training jobs over HTTP, by OpenAI's client; a hand does what their worker would."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from prometheus_client.parser import text_string_to_metric_families

from gossamer.api.metrics import FINISHED, UNFINISHED
from gossamer.jobs.methods import DECLARATIONS
from gossamer.jobs.settings import RunSettings
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


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "by default": (None, {"method": "sparta", "density": 0.005, "targets": "v,o"}),
    "sparta": (
        {"density": 0.05, "of": "targets", "mask_seed": 2**62},
        {"method": "sparta", "density": 0.05, "of": "targets", "mask_seed": 2**62},
    ),
    "lota": (
        {"method": "lota", "sparsity": 0.99, "iterations": 2, "targets": "re:mlp"},
        {"method": "lota", "sparsity": 0.99, "iterations": 2, "scope": "global"},
    ),
    "lotto": (
        {"method": "lotto", "parents": ["one", "two:1"], "mask_from": "one"},
        {"method": "lotto", "parents": ["one", "two:1"], "mask_from": "one"},
    ),
    "mcs": (
        {"method": "mcs", "score": "snip", "init_from": "one*0.5+two*-0.25"},
        {"method": "mcs", "score": "snip", "init_from": "one*0.5+two*-0.25"},
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_job_of_each_method_is_queued_as_it_was_asked_for(
    server: Running, tenant: Tenant, name: str
) -> None:
    digests = {
        name: server.upload(name, i, tenant.key)["digest"] for i, name in ((1, "one"), (2, "two"))
    }
    asked, expected = METHODS[name]
    job: Any = tenant.create(asked, seed=7, suffix="mine", metadata={"a": "b"})
    FineTuningJob.model_validate(job.to_dict())  # the client itself does not look so closely
    assert (job.object, job.status, job.model) == ("fine_tuning.job", "queued", "base")
    assert (job.training_file, job.validation_file) == (tenant.file, None)
    assert (job.organization_id, job.seed, job.suffix) == (tenant.name, 7, "mine")
    assert (job.metadata, job.integrations, job.result_files) == ({"a": "b"}, [], [])
    nothing = (job.fine_tuned_model, job.finished_at, job.trained_tokens, job.error)
    assert nothing == (None,) * 4
    assert {key: job.adapter[key] for key in expected} == expected
    assert set(job.adapter) == {"method", *DECLARATIONS[expected["method"]].parameters.model_fields}
    names = {"lotto": ("one", "two:1"), "mcs": ("one", "two")}.get(name, ())
    pinned = {n: f"{n.split(':')[0]}@{digests[n.split(':')[0]]}" for n in names}
    assert job.references == pinned
    assert tenant.jobs.retrieve(job.id) == job


def test_the_settings_of_a_run(tenant: Tenant) -> None:
    job: Any = tenant.create(hyperparameters={"n_epochs": "auto", "batch_size": "auto"}, seed=1)
    defaults = RunSettings()
    assert job.hyperparameters.n_epochs == defaults.epochs
    assert isinstance(job.hyperparameters.n_epochs, int)
    assert job.hyperparameters.batch_size == defaults.batch_size
    method = {
        "type": "supervised",
        "supervised": {
            "hyperparameters": {"n_epochs": 2.5, "learning_rate_multiplier": 2, "max_steps": 9}
        },
    }
    job = tenant.create(method=method, seed=2, validation_file=tenant.file)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.epochs) == (None, 2.5)
    assert job.hyperparameters.max_steps == 9
    assert job.hyperparameters.learning_rate_multiplier == 2.0
    assert job.method.type == "supervised"
    assert job.method.supervised.hyperparameters.learning_rate_multiplier == 2.0
    assert job.validation_file == tenant.file
    stored = tenant.server.services.backlog.get(tenant.name, job.id).request.settings
    assert RunSettings(**stored) == RunSettings(
        epochs=2.5, learning_rate_multiplier=2.0, max_steps=9
    )
    assert job.to_dict()["hyperparameters"].keys() == {
        *RunSettings.model_fields, "n_epochs",
    }  # fmt: skip


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


def test_a_request_that_is_repeated_makes_one_job(tenant: Tenant) -> None:
    """As the client does by itself, and as impatient users do."""

    def create(_: int) -> str:
        return tenant.create({"method": "lota"}, suffix="once").id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(create, range(24)))) == 1
    others = {
        tenant.create({"method": "lota"}, suffix="twice").id,
        tenant.create({"method": "mcs"}, suffix="once").id,
        tenant.create({"method": "lota"}, suffix="once", seed=1).id,
    }
    assert len(others) == 3
    assert len(list(tenant.jobs.list())) == 4
    first = create(0)
    tenant.jobs.cancel(first)
    assert create(0) != first  # whoever has cancelled it means to ask again


def test_lists_in_pages_and_by_metadata(tenant: Tenant) -> None:
    made = [
        tenant.create(seed=i, metadata={"parity": "odd" if i % 2 else "even", "é &[]=": "#"}).id
        for i in range(9)
    ]
    bare = [tenant.create(seed=i).id for i in range(9, 12)]
    newest_first = [*reversed(bare), *reversed(made)]
    page = tenant.jobs.list(limit=5)
    assert ([j.id for j in page.data], page.has_more) == (newest_first[:5], True)
    assert [j.id for j in page] == newest_first

    def ids(**options: Any) -> list[str]:
        return [job.id for job in tenant.jobs.list(**options)]

    assert ids(after=newest_first[9]) == newest_first[10:]
    assert ids(metadata={"parity": "odd"}, limit=2) == made[1::2][::-1]
    assert ids(metadata={"parity": "even", "é &[]=": "#"}) == made[::2][::-1]
    assert ids(metadata={"parity": "neither"}) == ids(metadata={"": ""}) == []
    assert ids(metadata={}) == newest_first
    assert ids(extra_query={"metadata": "null"}) == bare[::-1]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("after=ftjob-000000000000000000000000", "after"),
        ("after=%00", "after"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("status=queued", "status"),
        ("metadata=x", "metadata"),
        ("metadata=null&metadata[a]=b", "metadata"),
        ("metadata[a]=b&metadata[a]=c", "metadata"),
        ("metadata[a]=%00", "metadata"),
        (f"metadata[{'k' * 65}]=v", "metadata"),
        (f"metadata[k]={'v' * 513}", "metadata"),
        ("metadata[a=b", "metadata[a"),
    ],
)
def test_a_list_that_cannot_be_is_refused(tenant: Tenant, query: str, param: str) -> None:
    with tenant.server.http(tenant.key) as http:
        reply = http.get(f"/v1/fine_tuning/jobs?{query}")
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


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


ATTEMPTS: dict[str, Callable[[Any, str], Any]] = {
    "show": lambda http, job: http.get(f"/v1/fine_tuning/jobs/{job}"),
    "cancel": lambda http, job: http.post(f"/v1/fine_tuning/jobs/{job}/cancel"),
    "pause": lambda http, job: http.post(f"/v1/fine_tuning/jobs/{job}/pause"),
    "resume": lambda http, job: http.post(f"/v1/fine_tuning/jobs/{job}/resume"),
    "events": lambda http, job: http.get(f"/v1/fine_tuning/jobs/{job}/events"),
    "checkpoints": lambda http, job: http.get(f"/v1/fine_tuning/jobs/{job}/checkpoints"),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_another_tenant_s_job_is_like_a_missing_one(
    server: Running, tenant: Tenant, attempt: str
) -> None:
    theirs = tenant.create().id
    spy = server.new_key("spy")
    with server.http(spy) as http:
        answers = set()
        odd = ("%00", "%2e%2e", "x" * 4096, "%E2%80%AE", "a%0d%0ab")
        for job_id in (theirs, "ftjob-" + "0" * 24, "ftjob-1"):
            reply = ATTEMPTS[attempt](http, job_id)
            answers.add((reply.status_code, reply.text.replace(job_id, "…")))
        assert len(answers) == 1, answers
        status, text = answers.pop()
        assert (status, "job_not_found" in text) == (404, True)
        for job_id in odd:
            assert ATTEMPTS[attempt](http, job_id).status_code == 404
        assert http.get("/v1/fine_tuning/jobs").json()["data"] == []
        assert http.get(f"/v1/fine_tuning/jobs?after={theirs}").status_code == 400
    assert tenant.jobs.retrieve(theirs).status == "queued"


def test_the_methods_are_listed_with_what_they_take(tenant: Tenant) -> None:
    with tenant.server.http(tenant.key) as http:
        listed = http.get("/v1/fine_tuning/methods").json()
    methods = {row["id"]: row for row in listed["data"]}
    assert set(methods) == {name for name, row in DECLARATIONS.items() if row.job}
    for name, row in methods.items():
        declared = DECLARATIONS[name]
        assert (row["summary"], row["paper"]) == (declared.summary, declared.paper)
        assert row["parameters"]["properties"].keys() == declared.parameters.model_fields.keys()
        required = set(row["parameters"].get("required", ()))
        assert row["defaults"].keys() == declared.parameters.model_fields.keys() - required
        if not required:  # what is listed as a default may be sent
            tenant.create({"method": name, **row["defaults"]}, seed=1)
    assert listed["default_hyperparameters"] == RunSettings().model_dump(mode="json")
    tenant.create(hyperparameters=listed["default_hyperparameters"], seed=2)


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


def test_metrics_are_there_when_the_registry_is_not(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from gossamer.store.catalog.errors import RegistryBusy

    def busy() -> dict[str, int]:
        raise RegistryBusy(5.0)

    monkeypatch.setattr(server.services.backlog, "count", busy)
    with server.http("") as http:
        text = http.get("/metrics").text
    assert "gossamer_ready 1.0" in text
    assert "gossamer_jobs" not in text
    assert "could not be counted" in caplog.text
