"""The training methods: one file and one row each.

What they declare is in `gossamer.jobs.methods`, which imports no torch; this package does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gossamer.training.errors import UnknownMethodError
from gossamer.training.methods.full import FULL
from gossamer.training.methods.lora import LORA
from gossamer.training.methods.lota import LOTA
from gossamer.training.methods.lotto import LOTTO
from gossamer.training.methods.mcs import MCS
from gossamer.training.methods.method import Density, Method, Trained
from gossamer.training.methods.sparta import SPARTA

#: Name → method.
METHODS: Mapping[str, Method[Any]] = MappingProxyType(
    {row.declaration.name: row for row in (LOTA, LOTTO, SPARTA, MCS, FULL, LORA)}
)


def find_method(name: str) -> Method[Any]:
    """The method of that name.

    Raises:
        UnknownMethodError: there is none.
    """
    if name not in METHODS:
        raise UnknownMethodError(name, tuple(METHODS))
    return METHODS[name]


__all__ = ["METHODS", "Density", "Method", "Trained", "find_method"]
