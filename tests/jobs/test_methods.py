"""The declarations: names, defaults, bounds, and what they name."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.jobs.errors import JobsError, ParameterError, UnknownMethod
from gossamer.jobs.explain import Explained, explain
from gossamer.jobs.methods import (
    DECLARATIONS,
    Declaration,
    LotaParameters,
    MethodParameters,
    find_declaration,
)
from gossamer.jobs.patterns import Pattern
from gossamer.jobs.settings import RunSettings

DIGEST = "sha256:" + "a" * 64


def read(method: str, **parameters: Any) -> Any:
    return DECLARATIONS[method].read(parameters)


def refusal(method: str, **parameters: Any) -> ParameterError:
    with pytest.raises(ParameterError) as caught:
        read(method, **parameters)
    return caught.value


def test_the_methods_are_these() -> None:
    assert list(DECLARATIONS) == ["sparta", "lota", "lotto", "mcs", "full", "lora"]
    assert [d.name for d in DECLARATIONS.values() if not d.job] == ["full", "lora"]
    for name, declaration in DECLARATIONS.items():
        assert declaration.name == name
        assert declaration.paper.startswith("https://arxiv.org/abs/")
        assert declaration.summary.endswith(".")


def test_a_method_is_found_by_its_name() -> None:
    assert find_declaration("full") is DECLARATIONS["full"]
    for name, for_job in (("full", True), ("sql", False), ("", True)):
        with pytest.raises(UnknownMethod) as caught:
            find_declaration(name, for_job=for_job)
        assert ("full" in caught.value.known) == (not for_job)


@pytest.mark.parametrize("declaration", DECLARATIONS.values(), ids=lambda d: d.name)
def test_every_parameter_is_described_and_has_a_default_but_for_the_parents(
    declaration: Declaration,
) -> None:
    fields = declaration.parameters.model_fields
    assert [n for n, f in fields.items() if f.is_required()] == (
        ["parents"] if declaration.name == "lotto" else []
    )
    assert all(f.description for f in fields.values())
    assert {"init_from", "targets"} <= fields.keys()
    assert declaration.parameters.model_config.get("frozen")


def test_the_papers_settings_are_the_defaults() -> None:
    assert read("sparta").model_dump() == {
        "init_from": None,
        "init_positions": "inherit",
        "density": 0.005,
        "of": "model",
        "targets": "v,o",
        "mask_seed": None,
    }
    lota = read("lota")
    assert (lota.sparsity, lota.scope, lota.calibration_epochs) == (0.9, "global", 1.0)
    assert (lota.calibration_fraction, lota.iterations, lota.mask) == (1.0, 1, "calibrated")
    assert (lota.targets, lota.block_size) == ("all-linear", 1)
    mcs = read("mcs")
    assert (mcs.keep_ratio, mcs.targets, mcs.score, mcs.sign) == (0.1, "q,k,v", "mcs", "-")
    assert (mcs.period, mcs.selection_epochs, mcs.layer_drop) == (100, 1.0, False)
    assert (read("lora").rank, read("lora").alpha) == (8, 16.0)


@pytest.mark.parametrize(
    ("method", "parameters", "field"),
    [
        ("sparta", {"density": 0}, "density"),
        ("sparta", {"density": 1.5}, "density"),
        ("sparta", {"density": float("nan")}, "density"),
        ("sparta", {"mask_seed": 2**63}, "mask_seed"),
        ("sparta", {"sparsity": 0.9}, "sparsity"),
        ("lota", {"sparsity": 1}, "sparsity"),
        ("lota", {"sparsity": "much"}, "sparsity"),
        ("lota", {"block_size": 4}, "block_size"),
        ("lota", {"calibration_fraction": 0}, "calibration_fraction"),
        ("lota", {"calibration_epochs": float("inf")}, "calibration_epochs"),
        ("lota", {"calibration_steps": 0}, "calibration_steps"),
        ("lota", {"iterations": 9}, "iterations"),
        ("lota", {"parents": ["a"]}, "parents"),
        ("lotto", {}, "parents"),
        ("lotto", {"parents": []}, "parents"),
        ("lotto", {"parents": [f"a{i}" for i in range(17)]}, "parents"),
        ("lotto", {"parents": ["a", "B"]}, "parents.1"),
        ("lotto", {"parents": ["a*0.5"]}, "parents.0"),
        ("lota", {"mask_from": "a+b"}, "mask_from"),
        ("mcs", {"keep_ratio": 0}, "keep_ratio"),
        ("mcs", {"score": "best"}, "score"),
        ("mcs", {"period": 0}, "period"),
        ("mcs", {"warmup_steps": 0}, "warmup_steps"),
        ("lora", {"rank": 0}, "rank"),
        ("full", {"init_from": "../x"}, "init_from"),
        ("sparta", {"init_from": "a*1e999"}, "init_from"),
        ("sparta", {"targets": " , "}, "targets"),
        ("sparta", {"targets": "q" * 1025}, "targets"),
        ("sparta", {"targets": "re:("}, "targets"),
        ("sparta", {"targets": "re:(?=x)"}, "targets"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    method: str, parameters: dict[str, Any], field: str
) -> None:
    error = refusal(method, **parameters)
    assert error.field == f"parameters.{field}"
    assert error.problem
    assert not error.problem.startswith("Value error")


@pytest.mark.parametrize(
    ("method", "parameters", "field"),
    [
        ("lota", {"mask": "random", "mask_from": "a"}, "mask"),
        ("lota", {"mask": "random", "iterations": 2}, "iterations"),
        ("lota", {"mask_from": "a", "iterations": 2}, "iterations"),
        ("lotto", {"parents": ["a", "a"]}, "parents.1"),
        ("lotto", {"parents": ["a"], "init_from": "b"}, "init_from"),
        ("mcs", {"score": "snip", "sign": "-"}, "sign"),
    ],
)
def test_what_does_not_go_together_is_refused(
    method: str, parameters: dict[str, Any], field: str
) -> None:
    assert refusal(method, **parameters).field == f"parameters.{field}"


def test_the_99_percent_star_of_the_paper_can_be_asked_for() -> None:
    assert read("lota", sparsity=0.99, iterations=2).iterations == 2


def test_the_adapters_that_parameters_name_are_listed() -> None:
    assert read("sparta").references() == ()
    assert read("sparta", init_from=f"sql@{DIGEST}").references() == (f"sql@{DIGEST}",)
    lota = read("lota", init_from="x*0.5+a+x", init_positions="select", mask_from="z")
    assert lota.references() == ("x", "a", "z")
    lotto = read("lotto", parents=["a", "b:2"], mask_from="b:2")
    assert lotto.references() == ("b:2", "a")


def test_parameters_survive_json() -> None:
    lotto = read("lotto", parents=["a", "b:2"], sparsity=0.5)
    assert DECLARATIONS["lotto"].read(lotto.model_dump(mode="json")) == lotto
    assert isinstance(lotto, LotaParameters)


@given(st.sampled_from(sorted(DECLARATIONS)), st.dictionaries(st.text(max_size=12), st.none()))
def test_any_mapping_is_read_or_refused(method: str, given: dict[str, Any]) -> None:
    try:
        parameters = DECLARATIONS[method].read(given)
    except JobsError:
        return
    assert isinstance(parameters, MethodParameters)


# ---- patterns


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (r"layers\.(1[0-9]|2[0-9])\..*(q|v)_proj", "model.layers.12.self_attn.v_proj.weight", True),
        (r"layers\.(1[0-9]|2[0-9])\..*(q|v)_proj", "model.layers.2.self_attn.v_proj.weight", False),
        (r"^v_proj", "model.layers.2.self_attn.v_proj.weight", False),
        ("", "anything", True),
    ],
)
def test_a_pattern_is_searched_for(pattern: str, text: str, found: bool) -> None:
    assert Pattern(pattern).search(text) == found


def test_a_pattern_takes_linear_time() -> None:
    start = time.perf_counter()
    assert not Pattern("(.|.)*(.|.)*(.?){50}x$").search("model.layers.0." * 20)
    assert time.perf_counter() - start < 1


def test_a_pattern_too_large_to_compile_is_none() -> None:
    with pytest.raises(ValueError, match="not a regular expression"):
        Pattern("(a{1000}){1000}")
    with pytest.raises(ValueError, match="longer"):
        Pattern("a" * 1025)


# ---- explained


def named(model: Any) -> dict[str, Explained]:
    return {row.name: row for row in explain(model)}


def test_parameters_are_explained() -> None:
    lotto = named(DECLARATIONS["lotto"].parameters)
    assert lotto.keys() == DECLARATIONS["lotto"].parameters.model_fields.keys()
    assert (lotto["sparsity"].values, lotto["sparsity"].default) == ("number", "0.9")
    assert lotto["sparsity"].range == "≥ 0.0, < 1.0"
    assert lotto["scope"].values == "global | tensor"
    assert lotto["block_size"].values == "1 | 8 | 16 | 32"
    assert lotto["calibration_steps"].values == "whole number | none"
    assert lotto["calibration_steps"].range == "≥ 1, ≤ 10000000"
    assert (lotto["parents"].values, lotto["parents"].default) == ("list of text", None)
    assert lotto["parents"].range == "at least 1, at most 16"
    assert (lotto["mask_from"].values, lotto["mask_from"].default) == ("text | none", "null")
    settings = named(RunSettings)
    assert settings["packing"].values == "true | false"
    assert settings["optimizer"].values == "adamw | rmsprop | none"
    assert all(row.description for row in (*lotto.values(), *settings.values()))


def test_the_room_needs_no_torch() -> None:
    # The server checks jobs with it, and loads no training stack.
    probe = (
        "import sys, gossamer.jobs.backlog, gossamer.jobs.lease, gossamer.jobs.explain; "
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'accelerate', 'numba'}))"
    )
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert (found.stdout.strip(), found.stderr) == ("[]", "")
