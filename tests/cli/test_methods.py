"""`gossamer methods`, `--set`, and what docs/training.md says of both."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer

from gossamer.cli.assignments import read_assignments
from gossamer.cli.methods import used_by
from gossamer.jobs.explain import explain
from gossamer.jobs.methods import DECLARATIONS
from gossamer.jobs.settings import RunSettings
from tests.cli.running import assert_three_lines, run, run_json

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


def test_all_methods_are_listed() -> None:
    listed = run("methods")
    assert listed.exit_code == 0
    head, *rows = listed.stdout.splitlines()
    assert head.split() == ["METHOD", "FOR", "PAPER", "SUMMARY"]
    assert [row.split()[0] for row in rows] == list(DECLARATIONS)
    found = {row["name"]: row for row in run_json("methods")}
    assert found["lota"] == {
        "name": "lota",
        "for": ["jobs", "train"],
        "paper": "https://arxiv.org/abs/2406.16797",
        "summary": DECLARATIONS["lota"].summary,
    }
    assert found["full"]["for"] == ["train"]


def test_what_is_said_to_be_trainable_is() -> None:
    from gossamer.training.methods import METHODS

    offered = {name for name, row in DECLARATIONS.items() if "train" in used_by(row)}
    assert offered == set(METHODS) == set(DECLARATIONS)


@pytest.mark.parametrize("name", DECLARATIONS)
def test_a_method_is_explained(name: str) -> None:
    shown = run("methods", name).stdout
    document = run_json("methods", name)
    declaration = DECLARATIONS[name]
    assert declaration.summary in shown
    assert declaration.paper in shown
    fields = explain(declaration.parameters), explain(RunSettings)
    assert [p["name"] for p in document["parameters"]] == [f.name for f in fields[0]]
    assert [p["name"] for p in document["settings"]] == [f.name for f in fields[1]]
    words = " ".join(shown.split())
    for field in (*fields[0], *fields[1]):
        assert re.search(rf"^  {field.name}  \(", shown, re.MULTILINE)
        assert " ".join(field.description.split()) in words
        assert field.range in shown
    assert max(map(len, shown.splitlines())) <= 96


def test_defaults_and_ranges_are_shown() -> None:
    shown = run("methods", "lotto").stdout
    assert "  sparsity  (number; ≥ 0.0, < 1.0; default 0.9)\n" in shown
    assert "  scope  (global | tensor; default global)\n" in shown
    assert "  parents  (required; list of text; at least 1, at most 16)\n" in shown


def test_an_unknown_method() -> None:
    assert_three_lines(run("methods", "magic"), "magic", "lota", "gossamer methods")


def test_assignments_find_their_place_and_type() -> None:
    parameters, settings = read_assignments(
        DECLARATIONS["lotto"],
        [
            "parents=a, b:2",
            "block_size=16",
            "sparsity=9e-1",
            "scope=tensor",
            "mask_from=123",
            "init_from=null",
            "n_epochs=auto",
            "batch_size=4",
            "packing=true",
            "schedule=cosine",
        ],
    )
    assert parameters == {
        "parents": ["a", "b:2"],
        "block_size": 16,
        "sparsity": 0.9,
        "scope": "tensor",
        "mask_from": "123",
        "init_from": None,
    }
    assert settings == {"n_epochs": "auto", "batch_size": 4, "packing": True, "schedule": "cosine"}


def test_a_value_may_hold_every_character() -> None:
    parameters, _ = read_assignments(DECLARATIONS["sparta"], ["targets=re:a=b|[0-9],x"])
    assert parameters == {"targets": "re:a=b|[0-9],x"}
    parameters, _ = read_assignments(DECLARATIONS["lotto"], ['parents=["a", "b"]'])
    assert parameters == {"parents": ["a", "b"]}
    parameters, _ = read_assignments(DECLARATIONS["mcs"], ["sign=-", "init_from=a*0.5+b*-0.5"])
    assert parameters == {"sign": "-", "init_from": "a*0.5+b*-0.5"}


def test_what_is_no_value_is_left_for_whoever_checks_it() -> None:
    parameters, settings = read_assignments(
        DECLARATIONS["sparta"], ["density=NaN", "batch_size=many", "nonsense={"]
    )
    assert parameters == {"density": "NaN"}
    assert settings == {"batch_size": "many", "nonsense": "{"}
    json.dumps([parameters, settings], allow_nan=False)


@pytest.mark.parametrize("texts", [["x"], ["=1"], ["a=1", "a=2"], ["density=1", " density =2"]])
def test_what_is_no_assignment_is_refused(texts: list[str]) -> None:
    with pytest.raises(typer.BadParameter):
        read_assignments(DECLARATIONS["sparta"], texts)


def test_every_default_survives_its_own_text() -> None:
    """What `gossamer methods` shows as a default means that default when it is set."""
    for declaration in DECLARATIONS.values():
        given = {"parents": ["x"]} if declaration.name == "lotto" else {}
        defaults = declaration.read(given).model_dump(mode="json", exclude=set(given))
        texts = [
            f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in defaults.items()
        ]
        parameters, settings = read_assignments(declaration, texts)
        assert settings == {}
        assert parameters == defaults
    defaults = RunSettings().model_dump(mode="json")
    texts = [f"{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in defaults.items()]
    assert read_assignments(DECLARATIONS["lora"], texts)[1] == defaults


def _section(title: str) -> str:
    text = DOCS.read_text()
    match = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match is not None, f"docs/training.md has no section {title}"
    return match[1]


@pytest.mark.parametrize(
    ("method", "title"),
    [
        ("sparta", "SpaRTA"),
        ("lota", "LoTA"),
        ("lotto", "LoTTO"),
        ("mcs", "MCS"),
        ("full", "Baselines"),
        ("lora", "Baselines"),
    ],
)
def test_the_documentation_has_every_parameter_and_its_default(method: str, title: str) -> None:
    declaration, section = DECLARATIONS[method], _section(title)
    assert declaration.paper in section
    inherited = set(DECLARATIONS["lota"].parameters.model_fields) if method == "lotto" else set()
    common = {"init_from", "init_positions"}
    for field in explain(declaration.parameters):
        if field.name in inherited | common:
            continue
        row = re.search(rf"^\| `{field.name}` \| ([^|]*) \|", section, re.MULTILINE)
        assert row is not None, f"{title} says nothing of {field.name}"
        if field.default not in (None, "null"):
            assert row[1].strip().strip("`") == field.default.strip('"').removesuffix(".0")


def test_the_documentation_has_every_setting() -> None:
    section = _section("Settings")
    for field in explain(RunSettings):
        assert f"`{field.name}`" in section, field.name
    for name in ("init_from", *(["init_positions"] if _has_positions() else [])):
        assert f"`{name}`" in _section("Beginning with an adapter")


def _has_positions() -> bool:
    return "init_positions" in DECLARATIONS["sparta"].parameters.model_fields
