"""Training jobs that no worker has come for: as they were asked for, listed, and whose they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai.types.fine_tuning import FineTuningJob

from gossamer.jobs.methods import DECLARATIONS
from gossamer.jobs.settings import RunSettings
from tests.api.running import Running
from tests.api.tuning import Tenant


@pytest.fixture
def tenant(api: Running, request: pytest.FixtureRequest) -> Tenant:
    return Tenant(api, hashlib.sha256(request.node.nodeid.encode()).hexdigest())


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
        {"method": "mcs", "init_from": "one*0.5+two*-0.25"},
        {"method": "mcs", "init_from": "one*0.5+two*-0.25"},
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_job_of_each_method_is_queued_as_it_was_asked_for(
    api: Running, tenant: Tenant, name: str
) -> None:
    digests = {
        name: api.upload(name, i, tenant.key)["digest"] for i, name in ((1, "one"), (2, "two"))
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
    api: Running, tenant: Tenant, attempt: str
) -> None:
    theirs = tenant.create().id
    spy = api.new_key("spy")
    with api.http(spy) as http:
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


def test_metrics_are_there_when_the_registry_is_not(
    api: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from gossamer.store.catalog.errors import RegistryBusy

    def busy() -> dict[str, int]:
        raise RegistryBusy(5.0)

    monkeypatch.setattr(api.services.backlog, "count", busy)
    with api.http("") as http:
        text = http.get("/metrics").text
    assert "gossamer_ready 1.0" in text
    assert "gossamer_jobs" not in text
    assert "could not be counted" in caplog.text
