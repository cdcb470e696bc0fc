"""`gossamer adapters export`: from an adapter to another library's files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gossamer.cli.drafts import check_file, check_folder, draft_of
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
from gossamer.cli.options import (
    DEFAULT_URL,
    AsJson,
    Base,
    DataDir,
    Key,
    Url,
    load_settings,
    parse_size,
)
from gossamer.cli.output import Output, size

if TYPE_CHECKING:
    from gossamer.base.weights import StoredWeights
    from gossamer.store.delta import DeltaSet
    from gossamer.store.exchange.formats import Exporter
    from gossamer.store.format import Coding

#: Our own format, which is no row of the registry: it needs no base and has a coding.
_PACKED = "packed"
#: The one format that writes as many files as it takes.
_SHARDED = "merged"


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="An adapter file; or NAME or NAME:VERSION, of a server."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="`gossamer adapters formats` lists them; or packed, our own."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="PATH", help="A new or empty folder; the file, where it is packed."),
    ],
    values: Values = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Of a merged model: its files' largest size.  [default: 4GiB]"
        ),
    ] = None,
    coding: Annotated[
        Literal["auto", "raw", "zstd"] | None,
        typer.Option(help="Of a packed file.  [default: auto]", show_default=False),
    ] = None,
    force: Force = False,
    base: Base = None,
    data_dir: DataDir = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Write an adapter as another library reads it, or merged into the base's weights.

    docs/exchange.md explains the formats.
    """
    from gossamer.store.exchange.formats import ExportOptions

    output = Output(as_json)
    if to == _PACKED:
        if values is not None:
            raise typer.BadParameter("a packed file keeps its values", param_hint="--values")
        for option, given in (("--base", base), ("--data-dir", data_dir)):
            if given is not None:
                raise typer.BadParameter("a packed file needs no base", param_hint=option)
        _check_shards(to, shard_size)
        _repack(source, out, coding or "auto", force, _From(url, key), output)
        return
    if coding is not None or force:
        option = "--force" if force else "--coding"
        raise typer.BadParameter("only a packed file has it", param_hint=option)
    exporter = _exporter(to)
    options = ExportOptions(values)
    if (shard_bytes := _check_shards(to, shard_size)) is not None:
        options = replace(options, shard_bytes=shard_bytes)
    check_folder(out)
    settings = load_settings(base=base, data_dir=data_dir)
    with refusals(f"{source} cannot be exported."), _From(url, key).file(source, output) as file:
        weights = open_weights(settings, output)
        delta_set = _open_adapter(file, weights)
        with draft_of(out) as draft:
            draft.mkdir()
            made = exporter(delta_set, weights, draft, options)
    nbytes = sum((out / name).stat().st_size for name in made.files)
    document = {
        "format": to,
        "folder": str(out),
        "files": list(made.files),
        "bytes": nbytes,
        "facts": dict(made.facts),
        "warnings": list(made.warnings),
    }
    tell(output, document, f"{out}  {size(nbytes)}  {', '.join(made.files)}")


def _check_shards(to: str, size: str | None) -> int | None:
    """The size in bytes, where the format has files of a largest size."""
    if size is not None and to != _SHARDED:
        raise typer.BadParameter("only a merged model has it", param_hint="--shard-size")
    return None if size is None else parse_size(size)


@dataclass(frozen=True)
class _From:
    """The server that references are looked up on."""

    url: str
    key: str

    @contextmanager
    def file(self, source: str, output: Output) -> Iterator[Path]:
        """The adapter file that `source` is, or names; the latter is gone when the block ends.

        Raises:
            CommandError
        """
        from gossamer.cli.adapters import download
        from gossamer.cli.remote import Server

        if Path(source).is_file():  # a folder may well be called as the adapter is
            yield Path(source)
            return
        if source.endswith(".safetensors") or source.startswith((".", "/", "~")):
            raise CommandError(
                f"{source} cannot be exported.", "There is no such file.", "Check the path."
            )
        with tempfile.TemporaryDirectory(prefix="gossamer-export-") as folder:
            file = Path(folder) / "adapter.safetensors"
            with Server(self.url, self.key) as server:
                download(server, source, file, output, {})
            yield file


def _exporter(name: str) -> Exporter:
    from gossamer.store.exchange.registry import exporters

    known = exporters()
    return known[known_format(name, [*known, _PACKED], "--to")]


def _open_adapter(file: Path, base: StoredWeights) -> DeltaSet:
    from gossamer.store.format import open_validated

    return open_validated(file, base.table, base_fingerprint=base.fingerprint)


def _repack(
    source: str, out: Path, coding: Coding, force: bool, server: _From, output: Output
) -> None:
    """Write an adapter as a packed file; the base need not be there."""
    from gossamer.store.exchange.packing import pack
    from gossamer.store.format import read

    check_file(out, remedy="Give --force, or another --out.", force=force)
    with refusals(f"{source} cannot be exported."), server.file(source, output) as file:
        delta_set = read(file)
        with draft_of(out) as draft:
            written = pack(delta_set, draft, coding=coding)
    document = {
        "format": _PACKED,
        "file": str(out),
        **sums(delta_set, written),
        "facts": {},
        "warnings": [],
    }
    tell(output, document, line(document, out))
