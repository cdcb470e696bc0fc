"""Parameters that do not go together: which one is named, and what is kept of the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gossamer.jobs.errors import ParameterError
from gossamer.jobs.explain import explain
from gossamer.jobs.methods import DECLARATIONS
from gossamer.jobs.requests import JobRequest

LOTA: dict[str, Any] = {
    "sparsity": 0.9, "targets": "all-linear", "scope": "global", "calibration_fraction": 1.0,
    "calibration_epochs": 1.0, "calibration_steps": 1, "iterations": 1, "mask": "calibrated",
    "mask_from": "b", "block_size": 1,
}  # fmt: skip
CALIBRATION = {
    "scope", "calibration_fraction", "calibration_epochs", "calibration_steps", "iterations",
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "lota": LOTA,
    "sparta": {"density": 0.005, "of": "model", "targets": "v,o", "mask_seed": 1},
    "mcs": {
        "keep_ratio": 0.1, "targets": "q,k,v", "score": "mcs", "sign": "+", "period": 100,
        "warmup_steps": 5, "selection_epochs": 1.0, "block_size": 1, "layer_drop": False,
    },
}  # fmt: skip


def refused(method: str, parameters: dict[str, Any]) -> str:
    """The field that is named."""
    with pytest.raises(ParameterError) as caught:
        DECLARATIONS[method].read(parameters)
    assert caught.value.problem
    return caught.value.field.removeprefix("parameters.")


@pytest.mark.parametrize("method", OTHERS)
def test_nothing_that_selects_stands_beside_inherited_positions(method: str) -> None:
    """Not with its default either: who writes it means it."""
    model = DECLARATIONS[method].parameters
    assert OTHERS[method].keys() == model.model_fields.keys() - {"init_from", "init_positions"}
    for name, value in OTHERS[method].items():
        for given in ({"init_from": "a"}, {"init_from": "a", "init_positions": "inherit"}):
            assert refused(method, {**given, name: value}) == name
        chosen = {"init_from": "a", "init_positions": "select", name: value}
        assert getattr(DECLARATIONS[method].read(chosen), name) == value


@pytest.mark.parametrize("method", ["lota", "lotto"])
def test_nothing_that_selects_stands_beside_a_borrowed_mask(method: str) -> None:
    chain = {"parents": ["p"]} if method == "lotto" else {}
    for name, value in LOTA.items():
        given = {"mask_from": "b", name: value, **chain}
        if name in ("targets", "mask_from"):
            DECLARATIONS[method].read(given)
        else:
            assert refused(method, given) == name
    assert refused(method, {"mask_from": "b", "mask": "random", **chain}) == "mask"


@pytest.mark.parametrize("method", ["lota", "lotto"])
def test_a_random_mask_is_not_calibrated(method: str) -> None:
    chain = {"parents": ["p"]} if method == "lotto" else {}
    for name in LOTA.keys() - {"mask", "mask_from"}:
        given = {"mask": "random", name: LOTA[name], **chain}
        if name in CALIBRATION:
            assert refused(method, given) == name
        else:
            DECLARATIONS[method].read(given)


@pytest.mark.parametrize(
    ("method", "parameters", "field"),
    [
        ("lotto", {"parents": ["a", "b", "a"]}, "parents.2"),
        ("lotto", {"parents": ["a"], "init_from": "b"}, "init_from"),
        ("lotto", {"parents": ["a"], "init_from": "b", "sparsity": 0.5}, "init_from"),
        ("lotto", {"parents": ["a"], "init_positions": "select"}, "init_positions"),
        ("sparta", {"init_positions": "select"}, "init_positions"),
        ("mcs", {"score": "snip", "sign": "-"}, "sign"),
        ("full", {"init_from": "a", "init_positions": "inherit"}, "init_positions"),
    ],
)
def test_one_of_two_that_exclude_each_other_is_named(
    method: str, parameters: dict[str, Any], field: str
) -> None:
    assert refused(method, parameters) == field


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        *((method, {"init_from": "a*0.5+b*0.5"}) for method in OTHERS),
        *((method, {"init_from": "a", "init_positions": "select"}) for method in OTHERS),
        ("lota", {"mask_from": "b", "targets": "q"}),
        ("lota", {"mask": "random", "sparsity": 0.5}),
        ("lotto", {"parents": ["a"]}),
        ("lotto", {"parents": ["a"], "mask_from": "b"}),
        ("full", {"init_from": "a"}),
        ("lora", {}),
    ],
)
def test_what_is_kept_with_its_defaults_is_read_again_as_it_was_meant(
    method: str, parameters: dict[str, Any]
) -> None:
    read = DECLARATIONS[method].read(parameters)
    kept = json.loads(json.dumps(read.model_dump(mode="json")))
    assert kept.keys() == DECLARATIONS[method].parameters.model_fields.keys()
    again = DECLARATIONS[method].read(kept)
    assert again == read
    assert again.model_dump(mode="json") == kept
    for name, value in parameters.items():
        assert kept[name] == value


def test_what_means_nothing_is_kept_as_null() -> None:
    def nulls(method: str, parameters: dict[str, Any]) -> set[str]:
        kept = DECLARATIONS[method].read(parameters).model_dump(mode="json")
        return {name for name, value in kept.items() if value is None}

    assert nulls("sparta", {"init_from": "a"}) == OTHERS["sparta"].keys()
    assert nulls("sparta", {}) == {"init_from", "mask_seed"}
    assert nulls("lota", {"mask": "random"}) == CALIBRATION | {"mask_from", "init_from"}
    given = {"mask_from": "b"}
    assert nulls("lota", given) == LOTA.keys() - {"targets", "mask_from"} | {"init_from"}


def test_what_means_something_may_not_be_null() -> None:
    assert refused("sparta", {"density": None}) == "density"
    assert refused("lota", {"mask_from": "b", "targets": None}) == "targets"


def test_the_defaults_stay_what_they_are() -> None:
    rows = {row.name: row for row in explain(DECLARATIONS["lota"].parameters)}
    assert (rows["sparsity"].values, rows["sparsity"].default) == ("number", "0.9")
    rows = {row.name: row for row in explain(DECLARATIONS["full"].parameters)}
    assert (rows["init_positions"].values, rows["init_positions"].default) == ("select", '"select"')
    rows = {row.name: row for row in explain(DECLARATIONS["mcs"].parameters)}
    assert "5" in rows["selection_epochs"].description


def request(**fields: Any) -> JobRequest:
    return JobRequest.of(
        **{"method": "sparta", "training_file": "file-1", "base_fingerprint": "b", **fields}
    )


def test_a_request_that_says_nothing_more_is_the_same_request() -> None:
    """Equal digests: the same request within a minute is the same job."""
    plain = request(parameters={"init_from": "a"})
    again = request(parameters=plain.to_json()["parameters"])
    assert again == plain
    assert again.digest() == plain.digest()
    assert plain.to_json()["parameters"]["density"] is None


def test_evaluations_need_held_out_examples() -> None:
    with pytest.raises(ParameterError, match="held-out") as caught:
        request(settings={"eval_steps": 2})
    assert caught.value.field == "settings.eval_steps"
    request(settings={"eval_steps": 2}, validation_file="file-2")
    request(settings={"eval_steps": 2, "eval_fraction": 0.1})
