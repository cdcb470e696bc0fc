"""Training methods that make sparse adapters.

Importing this package imports no torch: a command line can show and check every setting first.
`train` brings in the training stack when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gossamer.training.config import TrainConfig
from gossamer.training.errors import TrainingError
from gossamer.training.methods import METHODS, Density, Method, MethodParameters, find_method
from gossamer.training.progress import Evaluation, Silent, Started, Step, Watcher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gossamer.base.load import BaseFiles
    from gossamer.training.run import TrainResult


def train(
    config: TrainConfig,
    base: BaseFiles,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    watcher: Watcher | None = None,
) -> TrainResult:
    """Train an adapter: `gossamer.training.run.train`, which imports torch and transformers."""
    from gossamer.training.run import train as run

    return run(config, base, model=model, tokenizer=tokenizer, watcher=watcher)


__all__ = [
    "METHODS",
    "Density",
    "Evaluation",
    "Method",
    "MethodParameters",
    "Silent",
    "Started",
    "Step",
    "TrainConfig",
    "TrainingError",
    "Watcher",
    "find_method",
    "train",
]
