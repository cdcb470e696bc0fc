"""`gossamer methods`: the training methods and what can be set for each. Asks no server."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.options import AsJson
from gossamer.cli.output import Output, table

if TYPE_CHECKING:
    from gossamer.jobs.explain import Explained
    from gossamer.jobs.methods import Declaration

_WIDTH, _INDENT = 96, " " * 6
#: of a text's default, as JSON has it and `--set` does not
_QUOTE = '"'


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The method to explain.  [default: all]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the training methods, or explain what can be set for one of them.

    `--set NAME=VALUE` of `gossamer train` and `gossamer jobs create` takes every parameter of the
    method and every setting of the run that is listed here.
    """
    output = Output(as_json)
    if name is None:
        _list(output)
    else:
        _explain(name, output)


def used_by(declaration: Declaration) -> tuple[str, ...]:
    """Who offers a method: `jobs`, `train`."""
    return ("jobs", "train") if declaration.job else ("train",)


def _list(output: Output) -> None:
    from gossamer.jobs.methods import DECLARATIONS

    rows = [
        (row.name, ", ".join(used_by(row)), row.paper, row.summary) for row in DECLARATIONS.values()
    ]
    text = table(("METHOD", "FOR", "PAPER", "SUMMARY"), rows)
    output.result([_document(row) for row in DECLARATIONS.values()], text)
    output.note("\n`gossamer methods NAME` lists what can be set for one.")


def _explain(name: str, output: Output) -> None:
    from gossamer.jobs.explain import explain
    from gossamer.jobs.methods import find_declaration
    from gossamer.jobs.settings import RunSettings

    declaration = find_declaration(name)
    parameters, settings = explain(declaration.parameters), explain(RunSettings)
    text = (
        f"{declaration.name}: {declaration.summary}\n{declaration.paper}\n"
        f"For {' and '.join(used_by(declaration))}.\n"
        f"\nParameters of the method:\n\n{_fields(parameters)}\n"
        f"\nSettings of a run, with any method:\n\n{_fields(settings)}"
    )
    document = {
        **_document(declaration),
        "parameters": [asdict(field) for field in parameters],
        "settings": [asdict(field) for field in settings],
    }
    output.result(document, text)


def _document(declaration: Declaration) -> dict[str, Any]:
    return {
        "name": declaration.name,
        "for": list(used_by(declaration)),
        "paper": declaration.paper,
        "summary": declaration.summary,
    }


def _fields(fields: Iterable[Explained]) -> str:
    return "\n".join(_field(field) for field in fields)


def _field(field: Explained) -> str:
    facts = ["required"] if field.default is None else []
    facts += [field.values, field.range]
    if field.default not in (None, "null"):
        facts.append(f"default {field.default.strip(_QUOTE)}")
    about = textwrap.fill(
        field.description,
        _WIDTH,
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
        break_on_hyphens=False,
    )
    return f"  {field.name}  ({'; '.join(filter(None, facts))})\n{about}"
