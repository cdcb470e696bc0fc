"""What a format is: a row with an importer, an exporter, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.store.delta import DeltaSet
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.files import Files
from gossamer.store.values import ValueDtype

#: A pickle's content as plain data: dicts, lists, numbers, strings and numpy arrays.
Unpickle = Callable[[Path], Any]


@dataclass(frozen=True)
class ImportOptions:
    """What a user may ask of an import.

    Attributes:
        value_dtype: round the values once to this dtype; None keeps the file's.
        density: keep this share of the weights' elements, those that differ most; None keeps all.
            Only for formats with `takes_density`.
        unpickle: how to open a pickle; None: pickles are refused. Only on the user's own machine.
    """

    value_dtype: ValueDtype | None = None
    density: float | None = None
    unpickle: Unpickle | None = None


@dataclass(frozen=True)
class Imported:
    """A foreign adapter as ours.

    Attributes:
        delta_set: its `base_fingerprint` is empty where the format does not say which base it is
            for; then names and shapes were all that could be compared.
        facts: what a user is told, for a machine: JSON values by name.
        warnings: the same for people, one sentence each.
    """

    delta_set: DeltaSet
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportOptions:
    """What a user may ask of an export.

    Attributes:
        value_dtype: the dtype of what is written; None: the format's or the base's own.
        shard_bytes: a file of weights has at most so many bytes, but for one larger tensor.
    """

    value_dtype: ValueDtype | None = None
    shard_bytes: int = 4 << 30


@dataclass(frozen=True)
class Exported:
    """What an exporter wrote.

    Attributes:
        files: their names in the folder.
        facts, warnings: as in `Imported`.
    """

    files: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def _nothing_to_see(_: Files) -> None:
    """Of a format that keeps everything in the files that it reads."""


@dataclass(frozen=True)
class Importer:
    """Reads a foreign adapter.

    Attributes:
        detect: whether files look like this format, by their names and small JSON files; never
            raises for what it does not know.
        read: may raise AdapterFileError.
        uploadable: also taken as it is over HTTP: no pickle, and nothing that needs the base's
            weights.
        takes_density: whether `ImportOptions.density` means something.
        reads: of an uploadable format: the names of all files that it reads, some of which may be
            missing. What else lies beside them is not sent, or not read.
        look: raises AdapterFileError where files that it does not read, by their names, are a part
            of the adapter that would be lost; `read` does so too.
    """

    detect: Callable[[Files], bool]
    read: Callable[[Files, BaseWeights, ImportOptions], Imported]
    uploadable: bool = False
    takes_density: bool = False
    reads: tuple[str, ...] = ()
    look: Callable[[Files], None] = _nothing_to_see


#: Writes an adapter into an empty folder; may raise `AdapterFileError` where the format cannot say
#: it, ValueError where the base's files are needed and not at hand.
Exporter = Callable[[DeltaSet, BaseWeights, Path, ExportOptions], Exported]


@dataclass(frozen=True)
class Format:
    """A row of the registry.

    Attributes:
        name: on the command line.
        title: one line for people.
        link: its source.
    """

    name: str
    title: str
    link: str
    importer: Importer | None = None
    exporter: Exporter | None = None
