"""The files of a foreign adapter: a folder, a single file, or the parts of an upload."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.tensors import FOREIGN, TensorFile, open_tensors
from gossamer.store.format.container import parse_json
from gossamer.store.format.source import open_source

_MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True)
class Files:
    """Names, as the other library writes them, to where they lie. No folders among them."""

    paths: Mapping[str, Path]

    @classmethod
    def at(cls, path: Path) -> Files:
        """The files directly in a folder, or the one file.

        Raises:
            OSError: it cannot be read.
        """
        if path.is_dir():
            with os.scandir(path) as entries:
                return cls({entry.name: Path(entry.path) for entry in entries if entry.is_file()})
        return cls({path.name: path})

    def __contains__(self, name: str) -> bool:
        return name in self.paths

    def path(self, name: str) -> Path:
        """Where a file lies.

        Raises:
            AdapterFileError: it is not among them.
        """
        if name not in self.paths:
            raise AdapterFileError("invalid_adapter_file", f"the file {printable(name)} is missing")
        return self.paths[name]

    def json(self, name: str, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
        """A small JSON object.

        Raises:
            AdapterFileError: missing, larger than `max_bytes`, or no JSON object.
        """
        with open_source(self.path(name)) as source:
            if source.size > max_bytes:
                message = f"{printable(name)} has {source.size} bytes, at most {max_bytes}"
                raise AdapterFileError("adapter_too_large", message + " are allowed")
            value = parse_json(source.read_at(0, source.size), printable(name), FOREIGN)
        if not isinstance(value, dict):
            raise AdapterFileError("invalid_adapter_file", f"{printable(name)} is no JSON object")
        return value

    @contextmanager
    def tensors(self, name: str) -> Iterator[TensorFile]:
        """A safetensors file, its header checked.

        Raises:
            AdapterFileError: missing or malformed.
        """
        with open_tensors(self.path(name)) as tensors:
            yield tensors
