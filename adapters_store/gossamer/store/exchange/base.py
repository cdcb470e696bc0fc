"""What an importer or exporter needs to know of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from gossamer.store.values import ValueDtype


class BaseWeights(Protocol):
    """The base model's names, shapes and, on demand, its weights."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def fingerprint(self) -> str:
        """`DeltaSet.base_fingerprint` of what was compared with these weights."""

    @property
    def table(self) -> Mapping[str, tuple[int, int]]:
        """Name → (out_features, in_features) of the weights that a delta may change."""

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Name → shape of every parameter of the loaded model, a tied one under its first name."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """The other names of tied parameters → the first one, which `parameters` has."""

    @property
    def folder(self) -> Path | None:
        """The model's Hugging Face directory; None where only names and shapes are known."""

    def read(self, name: str) -> tuple[NDArray[Any], ValueDtype]:
        """A parameter as its file stores it: its carrier of its shape, and the dtype.

        Any name of a tied parameter reads it.

        Raises:
            AdapterFileError: `unsupported_module`, the files hold no weight of that name, or the
                weights are not at hand here.
        """


def required_folder(base: BaseWeights) -> Path:
    """The base's directory.

    Raises:
        ValueError: only names and shapes are known.
    """
    if base.folder is None:
        raise ValueError(f"the files of the base {base.name} are not at hand")
    return base.folder
