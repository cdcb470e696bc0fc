"""Jobs that begin with adapters, of every method; and the fields that failures name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gossamer.jobs.methods import DECLARATIONS
from gossamer.jobs.views import Job, JobError
from tests.worker.support import TENANT, Plant, planted


@pytest.fixture(scope="module")
def plant(
    tmp_path_factory: pytest.TempPathFactory, tiny_dir: Callable[..., Path]
) -> Iterator[Plant]:
    """With an adapter `one`, `two` of the same entries, and `apart` of others."""
    with planted(tmp_path_factory.mktemp("plant") / "data", tiny_dir("llama")) as made:
        for name, seed in (("one", 1), ("two", 2)):
            given = {"targets": "q,v", "mask_seed": 7}
            made.submit("sparta", given, suffix=name, seed=seed, settings={"max_steps": 1})
        made.submit("sparta", {"targets": "o"}, suffix="apart", settings={"max_steps": 1})
        made.work()
        yield made


def begun(plant: Plant, method: str, parameters: dict[str, Any], *names: str, **more: Any) -> Job:
    """A job as the server keeps it: its references are what they mean now."""
    versions = {name: plant.store.catalog.show(TENANT, name).versions[0] for name in names}
    references = {name: f"{name}@{version.digest}" for name, version in versions.items()}
    job = plant.submit(method, parameters, references=references, **more)
    plant.work()
    return plant.get(job)


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("sparta", {"init_from": "one"}),
    ("sparta", {"init_from": "one", "init_positions": "select", "density": 0.01}),
    ("lota", {"init_from": "one"}),
    ("lota", {"init_from": "one", "init_positions": "select", "calibration_steps": 1}),
    ("lota", {"mask_from": "one"}),
    ("lota", {"mask_from": "one", "init_from": "one", "init_positions": "select"}),
    ("lota", {"mask": "random"}),
    ("lotto", {"parents": ["one"], "calibration_steps": 1}),
    ("lotto", {"parents": ["apart"], "mask_from": "one"}),
    ("mcs", {"init_from": "one"}),
    ("mcs", {"init_from": "one", "init_positions": "select", "period": 2}),
]


def test_every_method_of_jobs_is_tried() -> None:
    assert {method for method, _ in WAYS} == {d.name for d in DECLARATIONS.values() if d.job}


@pytest.mark.parametrize(("method", "parameters"), WAYS)
def test_a_job_may_begin_with_an_adapter(
    method: str, parameters: dict[str, Any], plant: Plant
) -> None:
    names = DECLARATIONS[method].read(parameters).references()
    # Adapters that say the same are one version: each way has an order of the examples of its own.
    seed = WAYS.index((method, parameters))
    job = begun(plant, method, parameters, *names, settings={"max_steps": 2}, seed=seed)
    assert (job.status, job.error) == ("succeeded", None)
    made = plant.store.catalog.open(job.digest or "")
    assert made.record["parameters"] == dict(job.request.parameters)
    if "mask_from" in parameters or (parameters.get("init_from") and len(parameters) == 1):
        one = plant.store.catalog.show(TENANT, "one").versions[0]
        assert made.record["density"]["nnz"] == plant.store.catalog.open(one.digest).nnz


def failure(plant: Plant, method: str, parameters: dict[str, Any], *names: str) -> JobError:
    job = begun(plant, method, parameters, *names)
    assert job.error is not None
    return job.error


FAILING: list[tuple[str, dict[str, Any], str, str]] = [
    ("sparta", {"density": 0.9, "targets": "v"}, "adapter.density", "a density from"),
    ("lota", {"sparsity": 0.99999999}, "adapter.sparsity", "a sparsity from"),
    ("lotto", {"sparsity": 0.0, "parents": ["one"], "targets": "q"}, "adapter.sparsity",
     "a sparsity from"),
    ("mcs", {"keep_ratio": 1e-8}, "adapter.keep_ratio", "a keep_ratio from"),
    ("mcs", {"warmup_steps": 50}, "adapter.warmup_steps", "warmup_steps"),
    ("sparta", {"targets": "nothing"}, "adapter.targets", "nothing"),
    ("lota", {"mask_from": "one", "targets": "down"}, "adapter.mask_from", "of mask_from"),
    ("lotto", {"parents": ["apart", "one", "two"]}, "adapter.parents.2", "'two' of parents.2"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "parameters", "param", "words"), FAILING)
def test_a_failure_names_the_field(
    method: str, parameters: dict[str, Any], param: str, words: str, plant: Plant
) -> None:
    names = DECLARATIONS[method].read(parameters).references()
    error = failure(plant, method, parameters, *names)
    assert error.param == param
    assert words in error.message
    if param != "adapter.density":
        assert "density" not in error.message


def test_an_adapter_that_has_gone_is_named_by_its_field(plant: Plant) -> None:
    given: list[tuple[str, dict[str, Any], str]] = [
        ("sparta", {"init_from": "one*0.5+gone"}, "adapter.init_from"),
        ("lota", {"mask_from": "gone"}, "adapter.mask_from"),
        ("lotto", {"parents": ["one", "gone"]}, "adapter.parents.1"),
    ]
    for method, parameters, param in given:
        error = failure(plant, method, parameters)
        assert (error.code, error.param) == ("invalid_adapter", param)
        assert f"'gone' of {param.removeprefix('adapter.')}" in error.message


def test_a_setting_is_named_as_it_is_in_the_request(plant: Plant) -> None:
    job = plant.submit(settings={"eval_fraction": 0.001})
    plant.work()
    error = plant.get(job).error
    assert error is not None
    assert error.param == "hyperparameters.eval_fraction"
    assert error.message.startswith("hyperparameters.eval_fraction: ")
