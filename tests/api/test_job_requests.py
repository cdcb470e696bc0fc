"""Requests for training jobs: what is refused, by which field, and what adapters' names mean."""

from __future__ import annotations

import hashlib
from typing import Any

import openai
import pytest

from gossamer.api.job_requests import _field_of
from gossamer.jobs.methods import DECLARATIONS
from gossamer.store.catalog.views import BaseInfo
from tests.api.hand import at_hand, base_of
from tests.api.running import Running, make_file
from tests.api.tuning import LINES, Tenant


@pytest.fixture
def tenant(api: Running, request: pytest.FixtureRequest) -> Tenant:
    return Tenant(api, hashlib.sha256(request.node.nodeid.encode()).hexdigest())


SETTINGS = "hyperparameters"
NESTED = "method.supervised.hyperparameters"


def nested(**settings: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": settings}}}


REFUSED: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "no model": ({"model": None}, 400, "model"),
    "another model": ({"model": "gpt-4o-mini"}, 404, "model"),
    "an adapter": ({"model": "sql"}, 400, "model"),
    "a mix": ({"model": "sql*0.5"}, 400, "model"),
    "a mix of nobody's": ({"model": "sql*0.5+nobody"}, 404, "model"),
    "a missing file": ({"training_file": "file-1"}, 400, "training_file"),
    "a missing validation file": ({"validation_file": "file-1"}, 400, "validation_file"),
    "no file": ({"training_file": None}, 400, "training_file"),
    "a suffix that is no name": ({"suffix": "My Model"}, 400, "suffix"),
    "an empty suffix": ({"suffix": ""}, 400, "suffix"),
    "a long suffix": ({"suffix": "x" * 65}, 400, "suffix"),
    "the base's suffix": ({"suffix": "base"}, 400, "suffix"),
    "a negative seed": ({"seed": -1}, 400, "seed"),
    "a huge seed": ({"seed": 2**32}, 400, "seed"),
    "a seed of text": ({"seed": "1"}, 400, "seed"),
    "integrations": ({"integrations": [{"type": "wandb"}]}, 400, "integrations"),
    "metadata of a number": ({"metadata": {"a": 1}}, 400, "metadata.a"),
    "much metadata": ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
    "long metadata": ({"metadata": {"a": "x" * 513}}, 400, "metadata.a"),
    "dpo": ({"method": {"type": "dpo", "dpo": {}}}, 400, "method.type"),
    "dpo beside": ({"method": {"type": "supervised", "dpo": {}}}, 400, "method.dpo"),
    "an unknown field": ({"epochs": 1}, 400, "epochs"),
    "an unknown setting": ({"hyperparameters": {"lr": 1}}, 400, f"{SETTINGS}.lr"),
    "no epochs": ({"hyperparameters": {"n_epochs": 0}}, 400, f"{SETTINGS}.n_epochs"),
    "no epochs of ours": ({"hyperparameters": {"epochs": 0}}, 400, f"{SETTINGS}.epochs"),
    "epochs twice": ({"hyperparameters": {"epochs": 1, "n_epochs": 1}}, 400, SETTINGS),
    "a text for a number": ({"hyperparameters": {"warmup": "1"}}, 400, f"{SETTINGS}.warmup"),
    "a fraction": ({"hyperparameters": {"batch_size": 1.5}}, 400, f"{SETTINGS}.batch_size"),
    "true": ({"hyperparameters": {"batch_size": True}}, 400, f"{SETTINGS}.batch_size"),
    "auto for ours": ({"hyperparameters": {"max_length": "auto"}}, 400, f"{SETTINGS}.max_length"),
    "a nested setting": (nested(schedule="wild"), 400, f"{NESTED}.schedule"),
    "nested epochs": (nested(n_epochs="many"), 400, f"{NESTED}.n_epochs"),
    "settings in two places": (nested(n_epochs=1) | {SETTINGS: {"n_epochs": 1}}, 400, SETTINGS),
    "an unknown method": ({"adapter": {"method": "magic"}}, 400, "adapter.method"),
    "a baseline": ({"adapter": {"method": "full"}}, 400, "adapter.method"),
    "a method of a number": ({"adapter": {"method": 1}}, 400, "adapter.method"),
    "another method's": ({"adapter": {"sparsity": 0.5}}, 400, "adapter.sparsity"),
    "out of range": ({"adapter": {"density": 0}}, 400, "adapter.density"),
    "a text": ({"adapter": {"density": "0.5"}}, 400, "adapter.density"),
    "a bad expression": ({"adapter": {"targets": "re:("}}, 400, "adapter.targets"),
    "no parents": ({"adapter": {"method": "lotto"}}, 400, "adapter.parents"),
    "a parent that is no name": (
        {"adapter": {"method": "lotto", "parents": ["sql", "A B"]}}, 400, "adapter.parents.1",
    ),
    "twins": (
        {"adapter": {"method": "lotto", "parents": ["sql", "sql"]}}, 400, "adapter.parents.1",
    ),
    "nobody's parent": (
        {"adapter": {"method": "lotto", "parents": ["sql", "nobody"]}}, 404, "adapter.parents.1",
    ),
    "nobody's mask": (
        {"adapter": {"method": "lota", "mask_from": "nobody"}}, 404, "adapter.mask_from",
    ),
    "nobody's beginning": ({"adapter": {"init_from": "sql*2+nobody:3"}}, 404, "adapter.init_from"),
    "a heavy mix": ({"adapter": {"init_from": "sql*17"}}, 400, "adapter.init_from"),
    "a parent for another base": (
        {"adapter": {"method": "lotto", "parents": ["foreign"]}}, 422, "adapter.parents.0",
    ),
    "a beginning for another base": (
        {"adapter": {"init_from": "sql+foreign"}}, 422, "adapter.init_from",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusing(api: Running) -> Tenant:
    """A tenant with an adapter for this base and one for another."""
    tenant = Tenant(api, "refused")
    api.upload("sql", 71, tenant.key)
    base = base_of(api)
    other = BaseInfo(base.name, "sha256:" + "0" * 64, base.table)
    with at_hand(api.services.settings.data_dir, other) as elsewhere:
        elsewhere.store.catalog.upload(tenant.name, "foreign", [make_file(other, 72)])
    return tenant


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_is_refused_by_its_field(refusing: Tenant, case: str) -> None:
    changes, status, param = REFUSED[case]
    body = {"model": "base", "training_file": refusing.file, **changes}
    with refusing.server.http(refusing.key) as http:
        reply = http.post(
            "/v1/fine_tuning/jobs", json={k: v for k, v in body.items() if v is not None}
        )
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert "Value error" not in error["message"]
    codes = {404: ("model_not_found",), 422: ("base_model_mismatch",)}
    if status in codes:
        assert error["code"] in codes[status]
    assert list(refusing.jobs.list()) == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ('"hyperparameters": {"learning_rate": 1e999}', "hyperparameters.learning_rate"),
        ('"hyperparameters": {"batch_size": 1e999}', "hyperparameters.batch_size"),
        ('"adapter": {"density": 1e999}', "adapter.density"),
        (f'"adapter": {{"mask_seed": {"1" * 4000}}}', "adapter.mask_seed"),
        (f'"seed": {"1" * 5000}', None),
        ('"hyperparameters": {"learning_rate": NaN}', None),
        ('"suffix": "\\ud800"', None),
        ('"hyperparameters": ' + '{"a": ' * 300 + "1" + "}" * 300, None),
    ],
)
def test_numbers_and_texts_that_are_none_are_refused(
    refusing: Tenant, fields: str, param: str | None
) -> None:
    body = f'{{"model": "base", "training_file": "{refusing.file}", {fields}}}'
    with refusing.server.http(refusing.key) as http:
        kind = {"content-type": "application/json"}
        reply = http.post("/v1/fine_tuning/jobs", content=body, headers=kind)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


def test_held_out_examples_come_from_one_place(tenant: Tenant) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        tenant.create(validation_file=tenant.file, hyperparameters={"eval_fraction": 0.1})
    assert refused.value.param == "hyperparameters.eval_fraction"


def test_a_result_file_is_nothing_to_train_on(tenant: Tenant) -> None:
    files = tenant.server.services.files
    with files.spool() as spool:
        spool.write(LINES)
        made = files.upload(tenant.name, "r.csv", "fine-tune-results", spool)
    with pytest.raises(openai.BadRequestError) as refused:
        tenant.create(training_file=made.id)
    assert (refused.value.param, refused.value.code) == ("training_file", "unusable_file")


def test_a_name_means_what_it_meant_when_the_job_was_created(api: Running, tenant: Tenant) -> None:
    first = api.upload("sql", 81, tenant.key)["digest"]
    job: Any = tenant.create({"init_from": "sql"})
    api.upload("sql", 82, tenant.key)
    assert job.references == {"sql": f"sql@{first}"}
    assert tenant.jobs.retrieve(job.id).to_dict()["references"] == job.references
    assert tenant.create({"init_from": "sql"}).id != job.id  # it means another one by now
    api.services.catalog._holds.check_integrity()


def test_another_tenant_s_adapter_is_nothing_to_begin_with(api: Running, tenant: Tenant) -> None:
    owner = api.new_key("owner")
    digest = api.upload("private", 91, owner)["digest"]
    answers = set()
    for given in ("private", f"private@{digest}", "owner/private", "missing", "nobody/missing"):
        for adapter in (
            {"init_from": given},
            {"method": "lota", "mask_from": given},
            {"method": "lotto", "parents": [given]},
        ):
            with pytest.raises(openai.NotFoundError) as refused:
                tenant.create(adapter)
            answers.add(refused.value.message.replace(given, "…").split("'param'")[0])
    assert len(answers) == 1, answers


@pytest.mark.parametrize("name", [name for name, row in DECLARATIONS.items() if row.job])
def test_every_reference_is_found_again_in_its_field(name: str) -> None:
    model = DECLARATIONS[name].parameters
    required: Any = {f: ("other",) for f, info in model.model_fields.items() if info.is_required()}
    found = set()
    for field in model.model_fields:
        value, index = (("y", "x"), ".1") if field in required else ("x", "")
        given: Any = model.model_construct(**{**required, field: value})
        if "x" in given.references():
            found.add(field)
            assert _field_of(given, "x") == f"adapter.{field}{index}"
    assert found == {"init_from", *({"mask_from", "parents"} & model.model_fields.keys())}
