"""The merge methods, one row each; a new one is one file here and one row in `METHODS`."""

from gossamer.merge.errors import MixError
from gossamer.merge.methods.linear import LINEAR
from gossamer.merge.methods.overlap_mean import OVERLAP_MEAN
from gossamer.merge.methods.spec import Method, Parameter, Parameters

__all__ = ["LINEAR", "METHODS", "OVERLAP_MEAN", "Method", "Parameter", "Parameters", "method_named"]

METHODS: dict[str, Method] = {method.name: method for method in (LINEAR, OVERLAP_MEAN)}


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
        MixError: there is none; the message lists what exists.
    """
    if name not in METHODS:
        message = f"unknown merge method {name[:40]!r}; there are {', '.join(sorted(METHODS))}"
        raise MixError("unknown_merge_method", message, field="method")
    return METHODS[name]
