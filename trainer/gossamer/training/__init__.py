"""Training methods that make sparse adapters.

Importing this package imports no torch: a command line can show and check every setting first.
`train` brings in the training stack when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gossamer.training.config import TrainConfig
from gossamer.training.errors import TrainingError
from gossamer.training.progress import Evaluation, Silent, Started, Step, Watcher

if TYPE_CHECKING:
    from gossamer.base.load import BaseFiles
    from gossamer.training.run import TrainResult


def train(config: TrainConfig, base: BaseFiles, **given: Any) -> TrainResult:
    """Train an adapter: `gossamer.training.run.train`, which imports torch and transformers."""
    from gossamer.training.run import train as run

    return run(config, base, **given)


__all__ = [
    "Evaluation",
    "Silent",
    "Started",
    "Step",
    "TrainConfig",
    "TrainingError",
    "Watcher",
    "train",
]
