"""Modules that compute otherwise for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def overriding(
    modules: Sequence[nn.Module], made: Callable[[nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Let each module's forward pass be what `made` returns for it, while the context lasts."""
    for module in modules:
        module.forward = made(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the instance's; its class has its own
