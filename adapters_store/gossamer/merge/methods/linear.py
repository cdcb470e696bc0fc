"""Task arithmetic: the weighted sum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gossamer.merge.errors import MixError
from gossamer.merge.methods.spec import Method, Parameter, Parameters


def fold(weights: NDArray[np.float64], params: Parameters) -> NDArray[np.float64]:
    """λ w_i, divided by Σ w_i where `normalize` says so.

    Raises:
        MixError: the weights to normalise by sum to zero.
    """
    if params["normalize"]:
        total = float(weights.sum())
        if abs(total) < 1e-6 * float(np.abs(weights).sum()):
            message = "normalize divides by the sum of the weights, which is zero"
            raise MixError("invalid_mix", message, field="params.normalize")
        weights = weights / total
    scaled: NDArray[np.float64] = weights * params["lambda"]
    return scaled


LINEAR = Method(
    name="linear",
    formula="λ Σ w_i τ_i; with normalize, divided by Σ w_i",
    paper="https://arxiv.org/abs/2212.04089",
    parameters=(
        Parameter("lambda", 1.0, -16.0, 16.0, "a common factor of all weights"),
        Parameter("normalize", False, about="divide the weights by their sum"),
    ),
    fold=fold,
)
