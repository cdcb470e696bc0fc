"""`gossamer adapters`: the adapters of a server, over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from gossamer.cli.drafts import check_file, draft_of
from gossamer.cli.errors import CommandError
from gossamer.cli.options import DEFAULT_URL, AsJson, Key, Url
from gossamer.cli.output import Output, percent, size, table, when

if TYPE_CHECKING:
    from collections.abc import Callable

    from gossamer.cli.remote import Server

app = typer.Typer(help="Adapters of a running server.", no_args_is_help=True)

_CHUNK = 1 << 18

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]


@app.command()
def push(
    name: Name,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            exists=True,
            help="The adapter file, or a folder with the files of another library's adapter.",
        ),
    ],
    activate: Annotated[
        bool,
        typer.Option(
            "--activate/--no-activate", help="Make it the version that the bare name means."
        ),
    ] = True,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Upload an adapter as a new version of NAME.

    Of a folder the files are sent that make an adapter in a format that servers take (`gossamer
    adapters formats`). What says the same as the current or the newest version makes no new one.
    """
    from gossamer.cli.folders import is_whole_adapter, push_folder
    from gossamer.cli.remote import Server

    output = Output(as_json)
    with Server(url, key) as server:
        send = push_folder if file.is_dir() or is_whole_adapter(file) else push_file
        version = send(server, name, file, output, activate=activate)
    for warning in version["warnings"]:
        output.note(f"Warning: {warning}")
    output.result(version, describe(version))


@app.command("ls")
def list_(url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """List the tenant's adapters, with sizes and densities of their current versions."""
    from gossamer.cli.remote import Server

    output = Output(as_json)
    with Server(url, key) as server:
        answer = server.call("GET", "/v1/adapters")
    rows = [_row(adapter) for adapter in answer["data"]]
    head = ("NAME", "CURRENT", "VERSIONS", "SIZE", "NNZ", "DENSITY", "IN MEMORY", "CREATED")
    usage = answer["usage"]
    output.result(answer, table(head, rows, head[1:7]) if rows else "")
    output.note(
        f"{usage['adapters']} of {usage['max_adapters']} adapters, "
        f"{size(usage['bytes'])} of {size(usage['max_bytes'])}."
    )


@app.command()
def show(
    name: Name,
    modules: Annotated[
        bool, typer.Option("--modules", help="Also what the current version changes, by weight.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Show an adapter's versions; with --json also every module and the training record."""
    from gossamer.cli.remote import Server, ref_path

    output = Output(as_json)
    with Server(url, key) as server:
        answer = server.call("GET", f"/v1/adapters/{ref_path(name)}")
    head = ("VERSION", "", "SIZE", "NNZ", "DENSITY", "VALUES", "IN MEMORY", "CREATED", "DIGEST")
    rows = [
        (
            version["id"],
            "current" if version["current"] else "",
            size(version["bytes"]),
            f"{version['nnz']:,}",
            percent(version["density"]),
            "+".join(version["value_dtypes"]),
            size(version["resident_bytes"]) if version["resident_bytes"] else "-",
            when(version["created_at"]),
            version["digest"],
        )
        for version in answer["versions"]
    ]
    text = table(head, rows, ("SIZE", "NNZ", "DENSITY", "IN MEMORY"))
    if modules:
        text += "\n\n" + _modules(answer)
    output.result(answer, text)


@app.command()
def pull(
    ref: Annotated[
        str,
        typer.Argument(metavar="REF", help="NAME, NAME:VERSION or NAME@sha256:DIGEST."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where to put it.  [default: NAME.safetensors]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    increment: Annotated[
        bool,
        typer.Option(
            "--increment",
            help="Only what a link of a chain adds to its parents; into NAME.increment.safetensors "
            "unless --out says otherwise.",
        ),
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Download the stored file of a version, byte for byte, and check its sha256."""
    from gossamer.cli.remote import Server

    output = Output(as_json)
    name = ref.rpartition("/")[2].partition("@")[0].partition(":")[0]
    kind = "increment.safetensors" if increment else "safetensors"
    target = Path(f"{name}.{kind}") if out is None else out
    check_file(target, remedy="Give --force.", force=force)
    with Server(url, key) as server:
        query = {"increment": "true"} if increment else {}
        document = download(server, ref, target, output, query)
    output.result(
        document, f"{target}  {size(document['bytes'])}  {document['digest'] or ''}".rstrip()
    )


@app.command("rm")
def remove(
    ref: Annotated[
        str,
        typer.Argument(metavar="REF", help="NAME for the whole adapter, NAME:VERSION for one."),
    ],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Delete an adapter or one version of it. Requests that run with it finish."""
    from gossamer.cli.remote import Server, ref_path

    with Server(url, key) as server:
        answer = server.call("DELETE", f"/v1/adapters/{ref_path(ref)}")
    Output(as_json).result(answer, f"{ref} is deleted.")


@app.command()
def rollback(
    name: Name,
    to: Annotated[
        int | None,
        typer.Option("--to", metavar="VERSION", min=1, help="[default: the one before]"),
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Make another version the one that the bare name means."""
    from gossamer.cli.remote import Server, ref_path

    with Server(url, key) as server:
        body = {} if to is None else {"version": to}
        version = server.call("POST", f"/v1/adapters/{ref_path(name)}/rollback", json=body)
    Output(as_json).result(version, describe(version))


def push_file(
    server: Server, name: str, file: Path, output: Output, *, activate: bool = True
) -> dict[str, Any]:
    """Upload a file, with a bar; the version as the server describes it."""
    from gossamer.cli.bars import transfer

    total = file.stat().st_size
    with file.open("rb") as opened, transfer(output, f"pushing {name}", total) as advance:
        return server.call(
            "POST",
            "/v1/adapters",
            params={"name": name, "activate": str(activate).lower()},
            headers={"content-type": "application/octet-stream", "content-length": str(total)},
            content=_pieces(opened, advance),
        )


def describe(version: dict[str, Any]) -> str:
    """A version in one line for people."""
    return (
        f"{version['id']}  {size(version['bytes'])}  {version['nnz']:,} values "
        f"({percent(version['density'])} of its weights)  {version['digest']}"
    )


def _pieces(file: BinaryIO, advance: Callable[[int], None]) -> Iterator[bytes]:
    while piece := file.read(_CHUNK):
        yield piece
        advance(len(piece))


def download(
    server: Server, ref: str, target: Path, output: Output, query: Mapping[str, str]
) -> dict[str, Any]:
    """The stored file of a version, or what it adds to its parents, at `target`; what is known of
    it.

    Raises:
        CommandError: it is not what the server announced.
    """
    from gossamer.cli.bars import transfer
    from gossamer.cli.remote import ref_path

    sha256, nbytes = hashlib.sha256(), 0
    with draft_of(target) as draft:
        path = f"/v1/adapters/{ref_path(ref)}/content"
        with server.stream("GET", path, params=query) as reply:
            total = int(reply.headers.get("content-length", 0)) or None
            with draft.open("wb") as file, transfer(output, f"pulling {ref}", total) as advance:
                for piece in reply.iter_bytes(_CHUNK):
                    sha256.update(piece)
                    nbytes += file.write(piece)
                    advance(len(piece))
            expected = reply.headers.get("etag", "").strip('"')
            digest = reply.headers.get("x-gossamer-digest")
        if sha256.hexdigest() != expected:
            raise CommandError(
                "The download is damaged.",
                f"Its sha256 is {sha256.hexdigest()}, and the server announced {expected}.",
                "Pull it again.",
            )
    return {
        "ref": ref,
        "file": str(target),
        "bytes": nbytes,
        "sha256": sha256.hexdigest(),
        "digest": digest,
    }


def _row(adapter: dict[str, Any]) -> tuple[str, ...]:
    versions = adapter["versions"]
    current = next((version for version in versions if version["current"]), None)
    numbered = sum(version["version"] is not None for version in versions)
    if current is None:
        return (adapter["id"], "-", str(numbered), "-", "-", "-", "-", when(adapter["created_at"]))
    return (
        adapter["id"],
        str(current["version"]),
        str(numbered),
        size(current["bytes"]),
        f"{current['nnz']:,}",
        percent(current["density"]),
        size(current["resident_bytes"]) if current["resident_bytes"] else "-",
        when(adapter["created_at"]),
    )


def _modules(answer: dict[str, Any]) -> str:
    current = next((version for version in answer["versions"] if version["current"]), None)
    if current is None:
        return "It has no current version."
    rows = [
        (
            module["name"],
            module["kind"] if module["kind"] == "element" else f"block {module['block_size']}",
            "×".join(str(n) for n in module["shape"]),
            f"{module['nnz']:,}",
            percent(module["density"]),
            module["value_dtype"],
        )
        for module in current["modules"]
    ]
    return table(("WEIGHT", "KIND", "SHAPE", "NNZ", "DENSITY", "VALUES"), rows, ("NNZ", "DENSITY"))
