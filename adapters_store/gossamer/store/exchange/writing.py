"""Safetensors files for other libraries, written a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gossamer.store.exchange.tensors import DTYPES, FOREIGN
from gossamer.store.format.container import render_header


@dataclass(frozen=True)
class Planned:
    """A tensor to come.

    Attributes:
        name: in the file.
        dtype: one of `tensors.DTYPES`.
        shape: of the tensor.
        make: its values, of that shape and of numpy's dtype for it; called once, when it is
            written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]


def write_tensors(
    path: Path, tensors: Sequence[Planned], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file; one tensor is in memory at a time.

    Args:
        tensors: names are unique. Those with the widest items come first in the file, so that
            every tensor is aligned, as the safetensors library lays them out.
        metadata: default: `{"format": "pt"}`, without which transformers refuses a file.

    Raises:
        ValueError: a tensor is not what was planned.
        OSError
    """
    ordered = sorted(tensors, key=lambda one: (-DTYPES[one.dtype].itemsize, one.name.encode()))
    rows = {one.name: (one.dtype, list(one.shape)) for one in ordered}
    if len(rows) != len(ordered):
        raise ValueError("two tensors have one name")
    with path.open("wb") as file:
        file.write(render_header(metadata or {"format": "pt"}, rows, FOREIGN))
        for one in ordered:
            made = one.make()
            if made.shape != one.shape or made.dtype != DTYPES[one.dtype]:
                raise ValueError(f"{one.name} is {made.dtype} {made.shape}, not as planned")
            file.write(made.reshape(-1).data.cast("B") if made.size else b"")


def path_warnings(file: str, key: str) -> tuple[str, ...]:
    """What a user is told of a file whose `key` says where the base lies on this machine."""
    return (
        f"{key} in {file} is the path of the base on this machine: before you pass the files on, "
        "put the name there under which others have it",
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A small JSON file, as people like to read it.

    Raises:
        OSError
    """
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
