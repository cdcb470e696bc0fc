"""Uploading a folder: the files of another library's adapter, as they are."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import httpx

from gossamer.cli.errors import CommandError
from gossamer.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable

    from gossamer.cli.remote import Server

#: A server converts one adapter at a time and says nothing meanwhile: as long as it takes uploads,
#: 16 by default, each of which may be a minute's work.
_CONVERTED = httpx.Timeout(60.0, connect=10.0, read=1800.0)


def is_whole_adapter(file: Path) -> bool:
    """Whether a file is called as an adapter of another library that is no more than that file: a
    server knows it by its name, and takes it all the same if it is a packed one."""
    from gossamer.store.exchange.files import Files
    from gossamer.store.exchange.registry import importers

    files = Files.at(file)
    return any(importer.detect(files) for importer in importers(uploadable=True).values())


def push_folder(
    server: Server, name: str, folder: Path, output: Output, *, activate: bool = True
) -> dict[str, Any]:
    """Upload the files of a folder that make an adapter, or the one file, with a bar; the version
    as the server describes it.

    Raises:
        CommandError: they are none that a server takes.
    """
    from gossamer.cli.bars import transfer
    from gossamer.store.errors import AdapterFileError
    from gossamer.store.exchange.files import Files
    from gossamer.store.exchange.packing import uploadable_format
    from gossamer.store.exchange.registry import importers

    files = Files.at(folder)
    try:
        form = uploadable_format(files)
        importers()[form].look(files)  # a server sees only what is sent
    except AdapterFileError as error:
        raise _unsendable(folder, error.message) from error
    reads = importers()[form].reads
    paths = [files.path(filename) for filename in reads if filename in files]
    if not any(path.suffix == ".safetensors" for path in paths):
        missing = " and ".join(filename for filename in reads if filename not in files)
        raise _unsendable(folder, f"of the files of {form} it has no {missing}")
    total = sum(path.stat().st_size for path in paths)
    with ExitStack() as opened, transfer(output, f"pushing {name}", total) as advance:
        parts = [
            (path.name, _Watched(opened.enter_context(path.open("rb")), advance)) for path in paths
        ]
        return server.call(
            "POST",
            "/v1/adapters",
            timeout=_CONVERTED,
            data={"name": name, "activate": str(activate).lower()},
            files=[("files", part) for part in parts],
        )


def _unsendable(folder: Path, why: str) -> CommandError:
    return CommandError(
        f"The files in {folder} cannot be sent.",
        why,
        "`gossamer adapters formats` lists what a server takes as it is.",
    )


class _Watched:
    """An open file whose reader is watched."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file = file
        self._advance = advance

    def fileno(self) -> int:
        """For its size."""
        return self._file.fileno()

    def read(self, size: int = -1) -> bytes:
        """Some more of it."""
        piece = self._file.read(size)
        self._advance(len(piece))
        return piece
