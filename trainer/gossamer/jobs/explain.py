"""Parameters as tables: what `gossamer methods` and the documentation list."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

#: JSON Schema's bounds, as mathematics writes them
_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
}
_LENGTHS = {"minItems": "at least {}", "maxItems": "at most {}"}


@dataclass(frozen=True)
class Explained:
    """One field of a model, in words.

    Attributes:
        values: the type, or the values to choose from: `number`, `text`, `global | tensor`.
        default: as JSON writes it; None where a value must be given.
        range: `> 0, ≤ 1`; empty where there is none.
        description: the field's own.
    """

    name: str
    values: str
    default: str | None
    range: str
    description: str


def explain(model: type[BaseModel]) -> tuple[Explained, ...]:
    """The fields of a declaration's parameters, or of the run settings, in their order."""
    schema = model.model_json_schema()
    required = set(schema.get("required", ()))
    return tuple(
        Explained(
            name=name,
            values=_values(field),
            default=None if name in required else json.dumps(field.get("default")),
            range=_range(field),
            description=field.get("description", ""),
        )
        for name, field in schema["properties"].items()
    )


_NAMES = {
    "number": "number",
    "integer": "whole number",
    "string": "text",
    "boolean": "true | false",
}


def _values(field: dict[str, Any]) -> str:
    if "enum" in field:
        return " | ".join(str(value) for value in field["enum"])
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field:
        return " | ".join(dict.fromkeys(_values(branch) for branch in field["anyOf"]))
    if field.get("type") == "array":
        return f"list of {_values(field['items'])}"
    return _NAMES.get(field.get("type", ""), "none")


def _range(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return ", ".join(filter(None, map(_range, field["anyOf"])))
    shown = [
        text.format(field[key]) for key, text in {**_BOUNDS, **_LENGTHS}.items() if key in field
    ]
    return ", ".join(shown)
