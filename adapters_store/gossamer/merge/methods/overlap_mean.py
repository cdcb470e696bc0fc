"""The overlap-aware mean of sparse task vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gossamer.merge.methods.spec import Method, Parameters, weighted_sum


def combine(
    values: NDArray[np.float32],
    present: NDArray[np.bool_],
    weights: NDArray[np.float64],
    _params: Parameters,
) -> NDArray[np.float64]:
    """Σ w_i τ_i / max(Σ M_i, 1) for every entry."""
    count = np.maximum(present.sum(axis=0), 1)
    mean: NDArray[np.float64] = weighted_sum(values, weights) / count
    return mean


#: Sparse updates rarely meet, so dividing everywhere by N shrinks them N-fold for nothing; this
#: divides only where they meet. The paper prints min(Σ M_i, 1), which would be the plain sum; its
#: text and its code divide by the count. Equal to mergekit's `ram` with epsilon 0.
OVERLAP_MEAN = Method(
    name="overlap_mean",
    formula="Σ w_i τ_i / max(Σ M_i, 1), entry by entry",
    paper="https://arxiv.org/abs/2507.07140",
    needs_correction=True,
    combine=combine,
)
