"""What is left of a pickle when it reaches an importer: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import ImportOptions
from gossamer.store.exchange.tensors import INTEGERS
from gossamer.store.format.container import invalid
from gossamer.store.values import CARRIER, ValueDtype


@dataclass(frozen=True, eq=False)
class PickledTensor:
    """A torch tensor or a numpy array.

    Attributes:
        dtype: one of `tensors.DTYPES`.
        array: of that dtype's numpy carrier, C-contiguous, of the tensor's shape.
    """

    dtype: str
    array: NDArray[Any]


@dataclass(frozen=True, eq=False)
class PickledSparse:
    """A torch tensor in coordinates.

    Attributes:
        shape: of the tensor.
        indices: integers [ndim, nnz].
        values: [nnz]
    """

    shape: tuple[int, ...]
    indices: PickledTensor
    values: PickledTensor


def unpickled(files: Files, name: str, options: ImportOptions) -> dict[str, Any]:
    """The content of a pickle that holds a dict with names for keys.

    Raises:
        AdapterFileError: `unsupported_file` where pickles are not opened; malformed, or no dict.
    """
    path: Path = files.path(name)
    if options.unpickle is None:
        raise AdapterFileError(
            "unsupported_file",
            f"{printable(name)} is a Python pickle, which is not opened here; convert it on your "
            "own machine with `gossamer adapters import`, then upload the result",
        )
    return named(options.unpickle(path), printable(name))


def named(found: Any, what: str) -> dict[str, Any]:
    """A dict whose keys are strings.

    Raises:
        AdapterFileError: it is something else.
    """
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        invalid(f"{what} is no dict with names for keys")
    return found


def integers(found: Any, name: str, what: str) -> NDArray[np.int64]:
    """Integers as int64: of a tensor, or of a list of numbers.

    Raises:
        AdapterFileError: they are something else, or beyond int64.
    """
    if isinstance(found, list | tuple):
        if not all(type(one) is int and -(2**63) <= one < 2**63 for one in found):
            invalid(f"{what} are not all integers of 64 bits", name)
        return np.array(found, np.int64)
    if not isinstance(found, PickledTensor) or found.dtype not in INTEGERS:
        invalid(f"{what} are no tensor of integers", name)
    return found.array.astype(np.int64)


def floats(found: Any, name: str, what: str) -> tuple[NDArray[Any], ValueDtype]:
    """Floats in their carrier, and their dtype; float64 is rounded to float32.

    Raises:
        AdapterFileError: they are something else.
    """
    if isinstance(found, PickledTensor) and found.dtype == "F64":
        with np.errstate(over="ignore"):  # infinite is refused where a delta is made
            return found.array.astype("<f4"), "F32"
    if not isinstance(found, PickledTensor) or found.dtype not in CARRIER:
        invalid(f"{what} are no tensor of floats", name)
    return found.array, found.dtype
