"""The training record: what an adapter says about how it came to be.

JSON values only, and nothing that differs between two runs of the same config on one machine: no
times, no paths, no memory. So the file of the adapter is the same byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
import transformers

from gossamer.training.config import TrainConfig
from gossamer.training.loop import History
from gossamer.training.methods import Trained

#: The loss is kept at about this many steps at most, evenly spread.
CURVE_POINTS = 64

#: Settings that say where things lie or run, not what is computed.
_NOT_RECORDED = {"data", "eval_data", "method", "parameters", "learning_rate", "seed"}


def run_identity(
    config: TrainConfig, data: Mapping[str, Any], base_fingerprint: str
) -> dict[str, Any]:
    """What makes two runs the same run: they may go on from each other's checkpoints."""
    settings = config.model_dump(mode="json", exclude={"data", "eval_data", "device"})
    return {"settings": settings, "data": dict(data), "base": base_fingerprint}


def training_record(
    config: TrainConfig,
    trained: Trained,
    history: History,
    *,
    phases: Mapping[str, int],
    learning_rate: float,
    data: dict[str, Any],
    base_fingerprint: str,
    device: str,
) -> dict[str, Any]:
    """The record of a finished run, without the fields that `export` adds."""
    parameters = config.parameters.model_dump(mode="json")
    return {
        "method": config.method,
        "parameters": parameters,
        "density": {
            "value": parameters.get("density"),
            "of": parameters.get("of"),
            "nnz": trained.density.nnz,
            "targets": trained.density.targets,
            "model": trained.density.model,
            "of_targets": trained.density.of_targets,
            "of_model": trained.density.of_model,
        },
        "seed": config.seed,
        "position_seeds": sorted(set(trained.seeds.values())),
        **trained.notes,
        "base_fingerprint": base_fingerprint,
        "data": data,
        "hyper_parameters": {
            **config.model_dump(mode="json", exclude=_NOT_RECORDED),
            "learning_rate": learning_rate,
            "device": device,
        },
        "steps": len(history.losses),
        "phases": dict(phases),
        "loss": _curve(history.losses),
        "evaluations": [asdict(evaluation) for evaluation in history.evaluations],
        "versions": {
            "gossamer": version("gossamer"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _curve(losses: list[float]) -> dict[str, Any]:
    """First, last and mean of the last tenth, and the loss at evenly spread steps."""
    tail = losses[-max(1, len(losses) // 10) :]
    stride = -(-len(losses) // CURVE_POINTS)
    return {
        "first": losses[0],
        "last": losses[-1],
        "mean_of_last_tenth": sum(tail) / len(tail),
        "stride": stride,
        "curve": [round(loss, 4) for loss in losses[::stride]],
    }
