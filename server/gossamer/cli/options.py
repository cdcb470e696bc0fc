"""Options that several commands have, so that they are called and explained the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.errors import USAGE, CommandError

if TYPE_CHECKING:
    from gossamer.api.settings import Settings

AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON for programs, one document a line.")
]
Url = Annotated[
    str,
    typer.Option("--url", envvar="GOSSAMER_URL", metavar="URL", help="The server's address."),
]
Key = Annotated[
    str,
    typer.Option(
        "--key",
        envvar="GOSSAMER_API_KEY",
        metavar="KEY",
        help="The API key.",
        show_default=False,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="FOLDER",
        help="The server's data folder.  [env var: GOSSAMER_DATA_DIR; default: ~/.gossamer]",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="BASE",
        help="A packaged base's name, a Hugging Face directory, a GGUF file, or a model of the Hub "
        "as owner/name@COMMIT.  "
        "[env var: GOSSAMER_BASE; default: smollm2-135m]",
        show_default=False,
    ),
]
Port = Annotated[
    int | None,
    typer.Option(
        "--port",
        metavar="PORT",
        min=0,
        max=65535,
        help="Port to listen on; 0 takes a free one.  [env var: GOSSAMER_PORT; default: 8000]",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="COUNT",
        min=1,
        help="Threads of one matrix product.  [env var: GOSSAMER_THREADS; default: torch's choice]",
        show_default=False,
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A parameter of the method or a setting of the run, as `gossamer methods NAME` lists "
        "them; may be given several times.",
        show_default=False,
    ),
]

DEFAULT_URL = "http://127.0.0.1:8000"

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes, from `4GiB`, `512M`, `1.5g` or a plain number. Units are powers of 1024.

    Raises:
        typer.BadParameter
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise typer.BadParameter(f"{text!r} is not a size; write 4GiB, 512MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def load_settings(**given: Any) -> Settings:
    """The server's settings: what was given on the command line, over the environment's.

    Args:
        given: fields of `Settings`; those that are None were not given.

    Raises:
        CommandError: one of them cannot have the value that it has.
    """
    from pydantic import ValidationError

    from gossamer.api.settings import Settings
    from gossamer.store.catalog.errors import BlobsUrlInvalid

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise CommandError(
            "The settings cannot be used.",
            f"{name}: {first['msg']} (got {first['input']!r})",
            f"Correct the option, or the environment variable GOSSAMER_{name.upper()}.",
            code=USAGE,
        ) from error
    except BlobsUrlInvalid as error:
        raise CommandError(
            "The settings cannot be used.",
            f"blobs_url: {error.why}",
            "Correct the environment variable GOSSAMER_BLOBS_URL.",
            code=USAGE,
        ) from error
