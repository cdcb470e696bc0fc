"""Requests and run settings: what is understood, what is refused, and when two are equal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gossamer.jobs.errors import ParameterError, UnknownMethod
from gossamer.jobs.methods import DECLARATIONS
from gossamer.jobs.requests import JobRequest, request_view
from gossamer.jobs.settings import RunSettings

DIGEST = "sha256:" + "a" * 64


def make(**fields: Any) -> JobRequest:
    return JobRequest.of(
        **{"method": "sparta", "training_file": "file-1", "base_fingerprint": "sha256:b", **fields}
    )


def refusal(**fields: Any) -> ParameterError:
    with pytest.raises(ParameterError) as caught:
        make(**fields)
    return caught.value


# ---- settings


def test_openais_names_are_understood() -> None:
    settings = RunSettings.of(n_epochs=3, batch_size=8, learning_rate_multiplier=0.5)
    assert (settings.epochs, settings.batch_size, settings.learning_rate_multiplier) == (3, 8, 0.5)
    auto = RunSettings.of(n_epochs="auto", batch_size="auto", learning_rate_multiplier="auto")
    assert auto == RunSettings()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"n_epochs": 0}, "settings.epochs"),
        ({"epochs": float("inf")}, "settings.epochs"),
        ({"epochs": "auto"}, "settings.epochs"),
        ({"n_epochs": 1, "epochs": 1}, "settings"),
        ({"batch_size": 10**9}, "settings.batch_size"),
        ({"max_steps": 0}, "settings.max_steps"),
        ({"learning_rate": float("nan")}, "settings.learning_rate"),
        ({"optimizer": "sgd"}, "settings.optimizer"),
        ({"schedule": "auto"}, "settings.schedule"),
        ({"eval_fraction": 1}, "settings.eval_fraction"),
        ({"seed": 1}, "settings.seed"),
        ({"device": "cuda"}, "settings.device"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        RunSettings.of(**settings)
    assert caught.value.field == field
    assert refusal(settings=settings).field == field


def test_settings_survive_json() -> None:
    settings = RunSettings.of(n_epochs=3, optimizer="rmsprop", packing=True)
    assert RunSettings.of(**json.loads(settings.model_dump_json())) == settings


def test_settings_can_be_extended_by_the_trainer() -> None:
    class Extended(RunSettings):
        device: str = "cpu"

    extended = Extended.of(n_epochs=2, device="cuda")
    assert (extended.epochs, extended.device) == (2, "cuda")
    assert isinstance(extended, Extended)


# ---- requests


def test_parameters_are_read_as_the_methods() -> None:
    request = make(method="lota", parameters={"sparsity": 0.5})
    assert request.parameters == DECLARATIONS["lota"].read({"sparsity": 0.5})
    same = make(method="lota", parameters=DECLARATIONS["lota"].read({"sparsity": 0.5}))
    assert same == request
    assert refusal(method="lota", parameters=DECLARATIONS["mcs"].read({})).field == "parameters"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"parameters": {"density": 2}}, "parameters.density"),
        ({"parameters": {"densty": 0.1}}, "parameters.densty"),
        ({"parameters": 3}, "parameters"),
        ({"method": 3}, "method"),
        ({"suffix": "No Name"}, "suffix"),
        ({"suffix": "base"}, "suffix"),
        ({"suffix": "smollm2", "model": "smollm2"}, "suffix"),
        ({"suffix": "a" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": "\0"}}, "metadata.a"),
        ({"metadata": {"a": "\ud800"}}, "metadata.a"),
        ({"metadata": {"a": 3}}, "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"training_file": None}, "training_file"),
        ({"references": {"sql": f"sql@{DIGEST}"}}, "references"),
        (
            {"validation_file": "file-2", "settings": {"eval_fraction": 0.1}},
            "settings.eval_fraction",
        ),
        ({"integrations": []}, "integrations"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    assert refusal(**fields).field == field


def test_a_key_that_is_too_long_is_refused_and_clipped_in_the_message() -> None:
    error = refusal(metadata={"\n" * 5000: "x"})
    assert error.field.startswith("metadata.")
    assert len(str(error)) < 1000
    assert "\n" not in str(error)


def test_a_field_that_is_missing_is_named() -> None:
    with pytest.raises(ParameterError) as caught:
        JobRequest.of(method="sparta", base_fingerprint="x")
    assert caught.value.field == "training_file"


@pytest.mark.parametrize("method", ["full", "lora", "sql", "", "SPARTA"])
def test_a_method_that_is_no_job_is_refused(method: str) -> None:
    with pytest.raises(UnknownMethod) as caught:
        make(method=method)
    assert caught.value.known == ("sparta", "lota", "lotto", "mcs")


def test_equal_requests_have_equal_digests_however_they_were_written() -> None:
    request = make(metadata={"a": "1", "b": "2"})
    same = make(
        parameters={"targets": "v,o", "density": 0.005},
        settings={"n_epochs": "auto"},
        metadata={"b": "2", "a": "1"},
        suffix=None,
    )
    assert same.digest() == request.digest()
    others = [
        make(),
        make(method="mcs"),
        make(parameters={"density": 0.004}),
        make(settings={"epochs": 2}),
        make(training_file="file-2"),
        make(validation_file="file-2"),
        make(suffix="a"),
        make(seed=0),
        make(base_fingerprint="sha256:c"),
    ]
    assert len({r.digest() for r in [request, *others]}) == 10


def test_a_request_is_shown_as_it_was_stored_whatever_a_later_release_knows() -> None:
    stored = make(method="lota", parameters={"sparsity": 0.5}, metadata={"a": "b"}).to_json()
    stored["method"], stored["parameters"] = "gone", {"no_longer": 1}
    view = request_view(json.loads(json.dumps(stored)))
    assert (view.method, view.parameters, view.metadata) == ("gone", {"no_longer": 1}, {"a": "b"})
