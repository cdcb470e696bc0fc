"""One training run, from a config and a base to an adapter."""

from __future__ import annotations

import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from gossamer.base.errors import UnsupportedBaseError
from gossamer.base.fingerprint import fingerprint
from gossamer.base.load import BaseFiles, load_model, load_tokenizer, stored_dtype
from gossamer.base.patch_map import adapter_table
from gossamer.store.delta import DeltaSet
from gossamer.store.errors import DeltaError
from gossamer.store.format import Written, seeded_positions, write
from gossamer.training.config import TrainConfig
from gossamer.training.data import read_examples
from gossamer.training.encode import Encoded, encode_examples
from gossamer.training.errors import BaseChangedError, ConfigError, DivergedError
from gossamer.training.export import Rounding, TrainedWeight, export, record_fields
from gossamer.training.loop import History, Task, Trainee, run_loop, steps_of
from gossamer.training.methods import Selection, find_method
from gossamer.training.progress import Evaluation, Silent, Started, Watcher
from gossamer.training.record import training_record
from gossamer.training.sparse import SparseLinear, attached


@dataclass(frozen=True)
class TrainResult:
    """What a run made.

    Attributes:
        delta_set: the adapter, its record inside.
        seeds: weight name → the seed of its positions; `save` stores these instead of positions.
        losses: of each step, nats per trained token.
        evaluations: of the held-out examples, the first before the first step.
        rounding: what rounding the values to the adapter's dtype lost.
        seconds: that the loop took.
        tokens: that it processed, padding not counted.
        peak_memory: bytes: of the process, or allocated on the GPU, at the fullest.
    """

    delta_set: DeltaSet
    seeds: Mapping[str, int]
    losses: Sequence[float]
    evaluations: Sequence[Evaluation]
    rounding: Rounding
    seconds: float
    tokens: int
    peak_memory: int

    @property
    def record(self) -> Mapping[str, Any]:
        """The training record."""
        return self.delta_set.record

    def save(self, target: str | Path | BinaryIO) -> Written:
        """Write the packed file, the positions as their seed where they have one."""
        return write(self.delta_set, target, seeds=self.seeds)


@dataclass(frozen=True)
class _Split:
    """The examples to train on and to hold out, and what the record says about them."""

    examples: Sequence[Encoded]
    held_out: Sequence[Encoded]
    dropped: int
    record: dict[str, Any]


def train(
    config: TrainConfig,
    base: BaseFiles,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: Tokenizer | None = None,
    watcher: Watcher | None = None,
) -> TrainResult:
    """Train an adapter.

    One run at a time in a process: it seeds the global random generators (and puts them back).

    Args:
        config: what to do.
        base: the base model's files; its name and fingerprint go into the adapter.
        model: the base, loaded and frozen already; bit for bit the same afterwards. Loaded from
            `base` when it is not given.
        tokenizer: likewise.
        watcher: is told what happens.

    Raises:
        TrainingError: one of its kinds (`gossamer.training.errors`).
        BaseModelError: the base cannot be loaded.
    """
    with _undisturbed():
        tokenizer = tokenizer or load_tokenizer(base)
        split = _read(config, tokenizer)
        model = model or _load(config, base)
        method = find_method(config.method)
        selection = method.select(config.parameters, adapter_table(model), config.seed)
        rate = config.learning_rate or method.learning_rate(selection.density)
        watcher = watcher or Silent()
        watcher.started(
            Started(
                method=method.name,
                density=selection.density,
                weights=len(selection.positions),
                learning_rate=rate,
                steps=steps_of(config, len(split.examples)),
                examples=len(split.examples),
                held_out=len(split.held_out),
                dropped=split.dropped,
                device=str(model.device),
            )
        )
        return _train(config, base, model, tokenizer, selection, split, rate, watcher)


def _train(
    config: TrainConfig,
    base: BaseFiles,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    selection: Selection,
    split: _Split,
    rate: float,
    watcher: Watcher,
) -> TrainResult:
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    before = fingerprint(model)
    began = time.monotonic()
    trainee = Trainee(model)
    # In 16 bits the differences would drown in the weights: see `SparseLinear`.
    written = config.precision == "fp32" and model.dtype in (torch.float32, torch.float64)
    with (
        tempfile.TemporaryDirectory(prefix="gossamer-train-") as scratch,
        attached(model, selection.positions, written=written) as layers,
    ):
        pad_id = next(
            i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None
        )
        task = Task(
            trainee, layers, split.examples, split.held_out, pad_id, rate, watcher, Path(scratch)
        )
        history = run_loop(config, task)
        trained = {name: _values(layer) for name, layer in layers.items()}
    seconds = time.monotonic() - began
    after = fingerprint(model)
    if after != before:
        raise BaseChangedError(before, after)
    delta_set, rounding = _export(config, base, trained, selection, history, rate)
    record = training_record(
        config,
        selection,
        history,
        learning_rate=rate,
        data=split.record,
        base_fingerprint=base.fingerprint,
        device=model.device.type,
    )
    record |= record_fields(rounding)
    return TrainResult(
        delta_set=replace(delta_set, record=record),
        seeds=selection.seeds,
        losses=tuple(history.losses),
        evaluations=tuple(history.evaluations),
        rounding=rounding,
        seconds=seconds,
        tokens=trainee.tokens,
        peak_memory=trainee.memory,
    )


def _values(layer: SparseLinear) -> TrainedWeight:
    values = layer.values.detach().to("cpu", torch.float32).numpy()
    return TrainedWeight(layer.support.shape, values)


def _export(
    config: TrainConfig,
    base: BaseFiles,
    trained: Mapping[str, TrainedWeight],
    selection: Selection,
    history: History,
    rate: float,
) -> tuple[DeltaSet, Rounding]:
    try:
        return export(
            trained,
            selection,
            base_fingerprint=base.fingerprint,
            base_name=base.name,
            value_dtype=config.value_dtype,
        )
    except DeltaError as error:
        raise DivergedError(
            f"a value cannot be stored: {error}", len(history.losses), rate
        ) from error


def _read(config: TrainConfig, tokenizer: Tokenizer) -> _Split:
    """The examples in tokens, split; before the model is loaded, so that mistakes show at once."""
    data = read_examples(config.data)
    encoded = encode_examples(data, tokenizer, config.max_length)
    examples, held_out, dropped = encoded.fitting, [], encoded.dropped
    record: dict[str, Any] = {"digest": data.digest, "examples": len(examples)}
    if config.eval_data is not None:
        held_data = read_examples(config.eval_data)
        held = encode_examples(held_data, tokenizer, config.max_length)
        held_out, dropped = list(held.fitting), dropped + held.dropped
        record["held_out_digest"] = held_data.digest
    elif config.eval_fraction:
        count = round(len(examples) * config.eval_fraction)
        if not 0 < count < len(examples):
            raise ConfigError(
                "eval_fraction", f"{config.eval_fraction:g} of {len(examples)} examples is {count}"
            )
        chosen = set(seeded_positions(config.seed, "held-out", len(examples), count).tolist())
        held_out = [example for index, example in enumerate(examples) if index in chosen]
        examples = [example for index, example in enumerate(examples) if index not in chosen]
        record["examples"] = len(examples)
    record |= {"held_out": len(held_out), "dropped": dropped}
    return _Split(examples, held_out, dropped, record)


def _load(config: TrainConfig, base: BaseFiles) -> PreTrainedModel:
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "there is no CUDA device on this machine")
    dtype = torch.float32
    if config.precision == "bf16" and stored_dtype(base.path) == torch.bfloat16:
        dtype = torch.bfloat16  # half the memory, and no bit of the base is lost
    try:
        return load_model(base, dtype, device, attention="sdpa")
    except UnsupportedBaseError:
        # some architectures have eager attention only; a base that is truly bad fails again here
        return load_model(base, dtype, device, attention="eager")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep to ourselves what the training stack does to the process: its random state, log lines
    and warnings about its own future."""
    state, numpy_state = random.getstate(), np.random.get_state()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|accelerate|torch)\b")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        random.setstate(state)
        np.random.set_state(numpy_state)
