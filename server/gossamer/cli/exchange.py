"""What import and export of other libraries' adapters have in common, and the list of formats."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gossamer.cli.errors import CommandError
from gossamer.cli.options import AsJson
from gossamer.cli.output import Output, percent, size, table

if TYPE_CHECKING:
    from gossamer.api.settings import Settings
    from gossamer.base.weights import StoredWeights
    from gossamer.store.delta import DeltaSet
    from gossamer.store.format import Written

Values = Annotated[
    Literal["F32", "F16", "BF16"] | None,
    typer.Option(help="Round the values to this type.  [default: as they are]", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]

_READ_ON = "docs/exchange.md says what each format may hold."
_REMEDIES = {
    "unsupported_file": "Give the folder with all of its files; `gossamer adapters formats` lists "
    "what can be read.",
    "base_model_mismatch": "Give the base that it was made for, with --base.",
}


def formats(as_json: AsJson = False) -> None:
    """List the formats of other libraries that can be read or written."""
    from gossamer.store.exchange.registry import FORMATS

    rows: list[dict[str, Any]] = [
        {
            "name": row.name,
            "title": row.title,
            "link": row.link,
            "import": row.importer is not None,
            "export": row.exporter is not None,
            "upload": row.importer is not None and row.importer.uploadable,
            "density": row.importer is not None and row.importer.takes_density,
            "files": [] if row.importer is None else list(row.importer.reads),
        }
        for row in FORMATS.values()
    ]
    marks = ("import", "export", "upload")
    head = ("NAME", *(mark.upper() for mark in marks), "TITLE")
    cells = [
        (row["name"], *("yes" if row[mark] else "-" for mark in marks), row["title"])
        for row in rows
    ]
    output = Output(as_json)
    output.result({"data": rows}, table(head, cells))
    output.note("`upload`: a server takes its files as they are (`gossamer adapters push`).")


def known_format(name: str, known: Collection[str], option: str) -> str:
    """The name, if it is one of the known formats."""
    if name not in known:
        raise typer.BadParameter(
            f"{name!r} is not one of {', '.join(sorted(known))}", param_hint=option
        )
    return name


def open_weights(settings: Settings, output: Output) -> StoredWeights:
    """The base that the settings name, fetched where it must be; its weights are read on demand.

    Raises:
        BaseModelError
    """
    from gossamer.base.sources import open_base
    from gossamer.base.weights import StoredWeights
    from gossamer.cli.bars import base_stages

    data_dir = settings.data_dir.expanduser().resolve()
    with base_stages(output) as progress:
        return StoredWeights.of(open_base(settings.base, data_dir, progress=progress))


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Refusals of files, with what is to be done about them here."""
    from gossamer.store.errors import AdapterFileError

    try:
        yield
    except AdapterFileError as error:
        tensor = error.tensor
        where = f" (tensor {tensor})" if tensor and tensor not in error.message else ""
        raise CommandError(
            what, " ".join(error.message.split()) + where, _REMEDIES.get(error.code, _READ_ON)
        ) from error


def sums(delta_set: DeltaSet, written: Written) -> dict[str, Any]:
    """What programs are told of a packed file."""
    from gossamer.store.format import digest

    touched = sum(delta.shape[0] * delta.shape[1] for delta in delta_set.deltas.values())
    return {
        "bytes": written.size,
        "digest": digest(delta_set),
        "base": delta_set.base_name,
        "base_fingerprint": delta_set.base_fingerprint,
        "weights": len(delta_set.deltas),
        "nnz": delta_set.nnz,
        "density": delta_set.nnz / touched if touched else 0.0,
    }


def line(document: Mapping[str, Any], where: object) -> str:
    """A packed file in one line for people."""
    return (
        f"{where}  {size(document['bytes'])}  {document['nnz']:,} values "
        f"({percent(document['density'])} of {document['weights']} weights)  {document['digest']}"
    )


def tell(output: Output, document: Mapping[str, Any], head: str) -> None:
    """The result; for people with the facts below it, and the warnings beside it."""
    for warning in document["warnings"]:
        output.note(f"Warning: {warning}")
    facts = [
        f"  {name.replace('_', ' ')}: {_shown(value)}"
        for name, value in document["facts"].items()
        if name not in document
    ]
    output.result(document, "\n".join([head, *facts]))


def _shown(value: Any) -> str:
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
