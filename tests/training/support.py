"""What the tests of the training room share: a tiny base, data files, short runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.base.fingerprint import fingerprint
from gossamer.base.load import BaseFiles, load_directory, load_model, load_tokenizer
from gossamer.store.delta import DeltaSet
from gossamer.training import Evaluation, Silent, Started, Step, TrainConfig
from gossamer.training.run import TrainResult, train


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def counting_examples(count: int = 24) -> list[dict[str, str]]:
    """A rule that a few steps learn: odd numbers have one answer, even ones another."""
    answers = (" three", " one two")
    return [{"prompt": f"Count {i}:", "completion": answers[i % 2]} for i in range(count)]


def tiny_base(path: Path) -> BaseFiles:
    return BaseFiles("tiny", path, fingerprint(load_directory(path, torch.float32)))


def short_run(base: BaseFiles, data: Path, **settings: Any) -> TrainResult:
    """A dozen steps at a rate that moves a tiny model."""
    defaults: dict[str, Any] = {
        "parameters": {"density": 0.05},
        "batch_size": 8,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "device": "cpu",
    }
    config = TrainConfig.of(data=data, **{**defaults, **settings})
    return train(config, base, model=load_model(base))


def linear_of(
    out_features: int, in_features: int, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values)
    return linear.requires_grad_(requires_grad=False)


def run_of(
    base: BaseFiles, data: Path, method: str, parameters: Mapping[str, Any], *,
    adapters: Mapping[str, DeltaSet] | None = None, **settings: Any,
) -> TrainResult:  # fmt: skip
    """A run of a method, of a few steps.

    Args:
        adapters: those that the parameters refer to.
        settings: of the config, and what `train` takes besides it.
    """
    defaults = {"batch_size": 8, "max_steps": 4, "learning_rate": 1e-2, "device": "cpu"}
    given: dict[str, Any] = {
        name: settings.pop(name)
        for name in ("folder", "stop", "watcher", "model", "keep")
        if name in settings
    }
    config = TrainConfig.of(
        data=data, method=method, parameters=parameters, **{**defaults, **settings}
    )
    model = given.pop("model", None) or load_model(base)
    if adapters is not None:
        given["adapters"] = adapters.__getitem__
    return train(config, base, model=model, tokenizer=load_tokenizer(base), **given)


class Recorder(Silent):
    """Keeps what a run tells."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def started(self, event: Started) -> None:
        self.events.append(event)

    def stepped(self, event: Step) -> None:
        self.events.append(event)

    def evaluated(self, event: Evaluation) -> None:
        self.events.append(event)

    def steps(self) -> list[Step]:
        return [event for event in self.events if isinstance(event, Step)]
