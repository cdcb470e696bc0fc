"""LoTTO: LoTA for one task after another, each on entries that none before it has trained.

Panda et al., "Lottery Ticket Adaptation" (2024), section 3. What comes out is self-contained: the
entries of the whole chain, those of its parents bit for bit. Nothing else is needed to serve it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer.jobs.methods import DECLARATIONS, LottoParameters
from gossamer.training.methods.lota import learning_rate, train_among
from gossamer.training.methods.method import Method, Trained
from gossamer.training.methods.recycling import Beginning
from gossamer.training.starting import chained

if TYPE_CHECKING:
    from gossamer.training.work import Work


def train(parameters: LottoParameters, work: Work) -> Trained:
    """Calibrate among the entries that the chain has left free, and train there.

    Raises:
        OverlapError: two parents share entries.
        AdapterError: a parent cannot be used.
        DensityError: too few entries are free.
    """
    chain = chained(
        [(name, work.open(name, f"parents.{i}")) for i, name in enumerate(parameters.parents)]
    )
    chosen = work.targets(parameters.targets)
    allowed = {}
    for name, shape in chosen.items():
        if name in chain.entries:
            free = torch.ones(shape[0] * shape[1], dtype=torch.bool)
            free[chain.entries[name].positions] = False
            allowed[name] = free.view(shape)
    elements = sum(rows * columns for rows, columns in chosen.values())
    before = sum(int((~mask).sum()) for mask in allowed.values())
    begin = Beginning(chain.entries, {"chain": chain.record()})
    trained = train_among(parameters, work, begin, allowed)
    own = sum(part.positions.numel() for part in trained.entries.values())
    free_now = {"of": elements, "before": elements - before, "after": elements - before - own}
    notes = {**trained.notes, "free_positions": free_now}
    return Trained(trained.entries, trained.density, 1, trained.fixed, notes=notes)


LOTTO = Method(DECLARATIONS["lotto"], train, learning_rate)
