"""`gossamer adapters import`: from another library's files to an adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.destination import check_server
from gossamer.cli.drafts import check_file, draft_of
from gossamer.cli.errors import CommandError
from gossamer.cli.exchange import (
    Force,
    Values,
    known_format,
    line,
    open_weights,
    refusals,
    sums,
    tell,
)
from gossamer.cli.options import DEFAULT_URL, AsJson, Base, DataDir, Key, Url, load_settings
from gossamer.cli.output import Output, size

if TYPE_CHECKING:
    from gossamer.store.delta import ValueDtype
    from gossamer.store.exchange.base import BaseWeights
    from gossamer.store.exchange.formats import Imported, ImportOptions
    from gossamer.store.format import Written


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", exists=True, help="The folder with the adapter, or its one file."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the adapter to this file.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Upload it as a new version of this name."),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="FORMAT", help="What it is.  [default: told by its files]"),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Of a checkpoint: keep this share of the weights' elements, those that differ "
            "most.  [default: all that differ]",
        ),
    ] = None,
    values: Values = None,
    force: Force = False,
    base: Base = None,
    data_dir: DataDir = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Convert an adapter of another library; --out or --push says where it goes.

    Everything is checked against the base that it will run on. Formats that are Python pickles are
    opened without running what is in them. docs/exchange.md explains the formats.
    """
    from gossamer.store.exchange.packing import pack

    if push is None and out is None:
        raise typer.BadParameter("say where the result goes", param_hint="--out or --push")
    if density is not None and not 0 < density <= 1:
        raise typer.BadParameter("a share is above 0 and at most 1", param_hint="--density")
    if out is not None:
        check_file(out, remedy="Give --force, or another --out.", force=force)
    settings, output = load_settings(base=base, data_dir=data_dir), Output(as_json)
    with refusals(f"{source} cannot be imported."):
        form, read = _choose(source, from_, density)
        weights = open_weights(settings, output)
        if push is not None:  # a mistake that shows after the conversion costs all of it
            check_server(url, key, push, weights)
        imported = read(weights, _options(values, density))
        with _file(out) as file:
            with draft_of(file) as draft:
                written = pack(imported.delta_set, draft)
            version = None
            if push is not None:
                with _kept(out, push):
                    version = _push(url, key, push, file, output)
    warnings = [*imported.warnings, *_size_warnings(written)]
    if not imported.delta_set.base_fingerprint and version is None:  # else the server says so
        warnings.append("The files do not say which base they are for; names and shapes match.")
    document = {
        "format": form,
        "file": None if out is None else str(out),
        **sums(imported.delta_set, written),
        "facts": dict(imported.facts),
        "warnings": warnings + ([] if version is None else version["warnings"]),
        "version": version,
    }
    tell(output, document, line(document, out or f"{push} ({url})"))


def _choose(
    source: Path, form: str | None, density: float | None
) -> tuple[str, Callable[[BaseWeights, ImportOptions], Imported]]:
    """The format's name, and what reads the source."""
    from gossamer.store.exchange.files import Files
    from gossamer.store.exchange.registry import detect, importers

    files, known = Files.at(source), importers()
    form = known_format(form, known, "--from") if form is not None else detect(files)
    importer = known[form]
    if density is not None and not importer.takes_density:
        raise typer.BadParameter(f"{form} has no choice of it", param_hint="--density")
    return form, partial(importer.read, files)


def _options(values: ValueDtype | None, density: float | None) -> ImportOptions:
    from gossamer.base.unpickle import unpickle
    from gossamer.store.exchange.formats import ImportOptions

    return ImportOptions(values, density, unpickle)


@contextmanager
def _file(out: Path | None) -> Iterator[Path]:
    """Where the result is written: `out`, or a file that is gone when the block ends."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="gossamer-import-") as folder:
        yield Path(folder) / "adapter.safetensors"


@contextmanager
def _kept(out: Path | None, name: str) -> Iterator[None]:
    """A push that fails need not be preceded by another conversion, if there is a file."""
    try:
        yield
    except CommandError as error:
        if out is None:
            raise
        remedy = f"{out} is there; when that is mended: gossamer adapters push {name} {out}"
        why = f"{error.why.rstrip('.')}. {error.remedy}"
        raise CommandError(error.what, why, remedy, code=error.code) from error


def _push(url: str, key: str, name: str, file: Path, output: Output) -> dict[str, Any]:
    from gossamer.cli.adapters import push_file
    from gossamer.cli.remote import Server

    with Server(url, key) as server:
        return push_file(server, name, file, output)


def _size_warnings(written: Written) -> list[str]:
    from gossamer.store.format import DEFAULT_LIMITS

    if written.size <= (most := DEFAULT_LIMITS.max_file_bytes):
        return []
    return [f"The file has {size(written.size)}; no server takes one of more than {size(most)}."]
