"""What a merge method declares: its parameters, its formula, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.merge.errors import MixError

Parameters = Mapping[str, Any]

#: values [k, P, …] float32 (zero where absent), present [k, P, …] bool (broadcastable), weights [k]
#: float64, parameters → merged [P, …] float64. Elementwise: no entry depends on another.
Combine = Callable[
    [NDArray[np.float32], NDArray[np.bool_], NDArray[np.float64], Parameters], NDArray[np.float64]
]

#: weights [k] float64, parameters → weights [k] float64 that say the same without the parameters.
Fold = Callable[[NDArray[np.float64], Parameters], NDArray[np.float64]]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: as requests spell it.
        default: its value where a request gives none; its type is the parameter's type.
        low: the smallest number allowed.
        high: the largest.
        about: one line for the documentation and for `--help`.
    """

    name: str
    default: float | bool
    low: float = -math.inf
    high: float = math.inf
    about: str = ""

    def checked(self, value: Any) -> float | bool:
        """`value` as this parameter's type.

        Raises:
            MixError: another type, or out of range.
        """
        field = f"params.{self.name}"
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise MixError("invalid_mix", f"{field} must be true or false", field=field)
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MixError("invalid_mix", f"{field} must be a number", field=field)
        if not (math.isfinite(value) and self.low <= value <= self.high):
            message = f"{field} must be in [{self.low:g}, {self.high:g}]"
            raise MixError("invalid_mix", message, field=field)
        return float(value)


@dataclass(frozen=True)
class Method:
    """A row of the registry.

    Attributes:
        name: as requests spell it.
        formula: what it computes, τ_i being a member's difference and M_i its support.
        paper: where it comes from.
        parameters: what may be given.
        needs_correction: whether the result differs from the weighted sum of the members.
        fold: turns the parameters into weights, where they say nothing else.
        combine: the formula over the entries where at least two members are present; None where
            the weighted sum is the result. With one member present it must give weight * value.
    """

    name: str
    formula: str
    paper: str
    parameters: tuple[Parameter, ...] = ()
    needs_correction: bool = False
    fold: Fold | None = None
    combine: Combine | None = None

    def checked(self, given: Parameters) -> dict[str, float | bool]:
        """Every parameter by name, defaults filled in.

        Raises:
            MixError: an unknown name, a wrong type, or out of range.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in given:
            if name not in known:
                has = ", ".join(known) or "none"
                message = f"method {self.name} has no parameter {name!r}; it has {has}"
                raise MixError("invalid_mix", message, field=f"params.{name}")
        return {
            name: parameter.checked(given[name]) if name in given else parameter.default
            for name, parameter in known.items()
        }


def weighted_sum(values: NDArray[np.float32], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ w_i τ_i over the first axis, in float64; a matrix product would add in BLAS's own order."""
    columns = weights.reshape(-1, *(1 for _ in values.shape[1:]))
    total: NDArray[np.float64] = np.add.reduce(columns * values, axis=0)
    return total
