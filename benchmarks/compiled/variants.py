"""Which variants there are."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from gossamer.kernels.gpu.variant import Variant

#: Modules that may have kernels; each lists its own as `VARIANTS`.
MODULES = tuple(
    f"gossamer.kernels.gpu.{op}"
    for op in ("element", "block", "scatter", "elementwise", "attention", "kv_cache", "rows")
)


class DuplicateNameError(Exception):
    """Two variants have one name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"two variants are called {name}")
        self.name = name


def find_variants(modules: Sequence[str] = MODULES) -> dict[str, tuple[str, Variant]]:
    """Module and variant by the variant's name, of the modules that exist.

    Raises:
        DuplicateNameError: two have the same name.
    """
    found: dict[str, tuple[str, Variant]] = {}
    for module in modules:
        if importlib.util.find_spec(module) is None:
            continue
        for variant in importlib.import_module(module).VARIANTS:
            if variant.name in found:
                raise DuplicateNameError(variant.name)
            found[variant.name] = (module, variant)
    return found
