"""The training methods: one file and one row each.

Importing this package imports no torch, so that a command line or a server can list, document and
validate the methods' parameters without the training stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gossamer.training.errors import UnknownMethodError
from gossamer.training.methods.method import Density, Method, MethodParameters, Selection
from gossamer.training.methods.sparta import SPARTA

#: Name → method.
METHODS: Mapping[str, Method[Any]] = MappingProxyType({row.name: row for row in (SPARTA,)})


def find_method(name: str) -> Method[Any]:
    """The method of that name.

    Raises:
        UnknownMethodError: there is none.
    """
    if name not in METHODS:
        raise UnknownMethodError(name, tuple(METHODS))
    return METHODS[name]


__all__ = ["METHODS", "Density", "Method", "MethodParameters", "Selection", "find_method"]
