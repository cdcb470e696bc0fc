"""The tensors of a Hugging Face checkpoint: one safetensors file, or several and an index."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from gossamer.store.errors import printable
from gossamer.store.exchange.files import Files
from gossamer.store.format.container import invalid
from gossamer.store.values import ValueDtype

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: An index names every tensor; that of many experts has some megabytes.
_MAX_INDEX_BYTES = 16 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: the file that holds it, and what its header says of it."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Shards:
    """An inspected checkpoint; of its tensors, none has been read.

    Attributes:
        tensors: by their names in the files, file by file, as they lie there.
    """

    files: Files
    tensors: Mapping[str, Stored]

    @classmethod
    def of(cls, files: Files) -> Shards:
        """The tensors of `model.safetensors`, or of the files that the index lists.

        A tensor of a listed file that the index does not name counts as well: transformers loads
        it.

        Raises:
            AdapterFileError: malformed, a file or a tensor is missing, or a tensor is there twice.
        """
        wanted = {SINGLE: set[str]()} if SINGLE in files else _indexed(files)
        found: dict[str, Stored] = {}
        for file in sorted(wanted):
            with files.tensors(file) as opened:
                rows = sorted(opened.infos.items(), key=lambda row: row[1].offset)
            for name, info in rows:
                if name in found:
                    first = printable(found[name].file)
                    invalid(f"the tensor is in {first} and again in {printable(file)}", name)
                found[name] = Stored(file, name, info.dtype, info.shape, info.nbytes)
            for name in sorted(wanted[file]):
                if name not in found or found[name].file != file:
                    invalid(f"{printable(file)} lacks it, {INDEX} says that it is there", name)
        return cls(files, found)

    def read(self, stored: Stored) -> NDArray[Any]:
        """A tensor as it is stored (`tensors.DTYPES`), read-only.

        Raises:
            AdapterFileError: the file is not any more what it was.
        """
        with self.files.tensors(stored.file) as opened:
            return opened.read(stored.name)

    def read_values(self, stored: Stored) -> tuple[NDArray[Any], ValueDtype]:
        """Floats in their carrier, and their dtype; float64 is rounded to float32.

        Raises:
            AdapterFileError: of another dtype, or the file is not any more what it was.
        """
        with self.files.tensors(stored.file) as opened:
            return opened.read_values(stored.name)


def is_checkpoint(files: Files) -> bool:
    """Whether files of a checkpoint's names are there."""
    return SINGLE in files or INDEX in files


def loaded_names(
    stored: Iterable[str], known: Collection[str], prefixes: Collection[str]
) -> dict[str, str]:
    """Names in a checkpoint → the model's own, as transformers loads them.

    A checkpoint of the bare model lacks the prefix that its causal language model has (`model.`),
    and one with a prefix loads into a model without.

    Args:
        known: the model's names.
        prefixes: without the dot, such as `model`.

    Returns:
        Only what has a place in the model.
    """
    found: dict[str, str] = {}
    for name in stored:
        first, _, rest = name.partition(".")
        candidates = [name, *(f"{prefix}.{name}" for prefix in prefixes)]
        candidates += [rest] if first in prefixes else []
        own = next((candidate for candidate in candidates if candidate in known), None)
        if own is not None:
            found[name] = own
    return found


def prefixes_of(names: Iterable[str]) -> set[str]:
    """What may be before a model's names in one file and not in another: their first parts."""
    return {name.partition(".")[0] for name in names}


def _indexed(files: Files) -> dict[str, set[str]]:
    """Each listed file, and the names of the tensors that it should hold."""
    rows = files.json(INDEX, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(rows, dict) or not rows:
        invalid(f"{INDEX} has no weight_map")
    wanted: dict[str, set[str]] = {}
    for name, file in rows.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            invalid(f"{INDEX} names {printable(str(file))}, which is no safetensors file", name)
        wanted.setdefault(file, set()).add(name)
    return wanted
