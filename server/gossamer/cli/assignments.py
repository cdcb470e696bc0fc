"""`--set NAME=VALUE`: parameters of a method and settings of a run, told apart and read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from gossamer.jobs.methods import Declaration


def read_assignments(
    declaration: Declaration, texts: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The method's parameters, and the run's settings: a name is a parameter where the method
    declares it.

    A value is JSON (`0.9`, `true`, `null`) where the name does not stand for text, and for a list
    also its items with commas between them. What is neither is passed on as text, so that whoever
    checks the value can say what is wrong with it.

    Raises:
        typer.BadParameter: a text is not NAME=VALUE, or a name is given twice.
    """
    from gossamer.jobs.settings import RunSettings

    declared = declaration.parameters.model_json_schema()["properties"]
    known = RunSettings.model_json_schema()["properties"]
    parameters: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
        if name in parameters or name in settings:
            raise typer.BadParameter(f"{name} is set twice", param_hint="--set")
        kept = parameters if name in declared else settings
        kept[name] = _value(value.strip(), declared.get(name) or known.get(name) or {})
    return parameters, settings


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    kinds = {branch.get("type") for branch in schema.get("anyOf", [schema])}
    if "string" in kinds and not ("null" in kinds and text == "null"):
        return text  # a name like 123 is one all the same
    if "array" in kinds and not text.startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        return json.loads(text, parse_constant=_not_json)
    except ValueError:
        return text


def _not_json(constant: str) -> None:
    raise ValueError(constant)
