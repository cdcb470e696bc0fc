"""One training run, from a config and a base to an adapter."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from gossamer.base.ends import end_tokens, read_generation_config
from gossamer.base.load import BaseFiles
from gossamer.base.patch_map import adapter_table
from gossamer.store.delta import DeltaSet
from gossamer.store.errors import DeltaError
from gossamer.store.format import Written, seeded_positions, write
from gossamer.training.checkpoints import WorkFolder
from gossamer.training.config import TrainConfig
from gossamer.training.data import never, read_examples
from gossamer.training.encode import Encoded, encode_examples
from gossamer.training.errors import ConfigError, DivergedError
from gossamer.training.export import Rounding, export, record_fields
from gossamer.training.loading import Lent, LoadedBase
from gossamer.training.methods import Trained, find_method
from gossamer.training.packing import check_packing
from gossamer.training.progress import Evaluation, Silent, Watcher
from gossamer.training.record import run_identity, training_record
from gossamer.training.starting import Adapters, no_adapters
from gossamer.training.work import Material, Work


@dataclass(frozen=True)
class TrainResult:
    """What a run made.

    Attributes:
        delta_set: the adapter, its record inside.
        seeds: weight name → the seed of its positions; `save` stores these instead of positions.
        losses: of each step, nats per trained token.
        evaluations: of the held-out examples, the first before the first step.
        rounding: what rounding the values to the adapter's dtype lost.
        seconds: that the run took, in this process.
        tokens: that it processed, padding not counted.
        peak_memory: phase → bytes at its fullest: of the process, or allocated on the GPU. Of the
            phases that this process ran; those of attempts before are not known.
    """

    delta_set: DeltaSet
    seeds: Mapping[str, int]
    losses: Sequence[float]
    evaluations: Sequence[Evaluation]
    rounding: Rounding
    seconds: float
    tokens: int
    peak_memory: Mapping[str, int]

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
    loaded: LoadedBase | None = None,
    watcher: Watcher | None = None,
    adapters: Adapters = no_adapters,
    folder: Path | None = None,
    stop: Callable[[], bool] = never,
    keep: Callable[[int, DeltaSet, Mapping[str, float]], None] | None = None,
) -> TrainResult:
    """Train an adapter.

    One run at a time in a process: it seeds the global random generators (and puts them back).

    Args:
        config: what to do.
        base: the base model's files; its name and fingerprint go into the adapter.
        model: the base, loaded and frozen already; bit for bit the same afterwards. Loaded from
            `base` when it is not given.
        tokenizer: likewise.
        loaded: keeps what is loaded from `base` for the next run.
        watcher: is told what happens.
        adapters: opens those that the method's parameters refer to.
        folder: a run that was killed goes on from what it has kept there; the result is the same.
        stop: asked while the examples are read and tokenised, after each step, and before each
            batch of an evaluation; True ends the run, with a checkpoint if there is a folder.
        keep: is given the step, the adapter as it stands and its metrics every `checkpoint_steps`
            of the final training, or after each pass over the examples.

    Raises:
        TrainingError: one of its kinds (`gossamer.training.errors`).
        BaseModelError: the base cannot be loaded.
    """
    with _undisturbed():
        loaded = loaded or LoadedBase(base)
        tokenizer = tokenizer or loaded.tokenizer
        generation = read_generation_config(base.path) if model is None else model.generation_config
        ends = end_tokens(tokenizer, generation)
        split = _read(config, tokenizer, ends, stop)
        kept = None
        if folder is not None:
            identity = run_identity(config, split.record, base.fingerprint)
            kept = WorkFolder(folder, identity)
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        material = Material(
            examples=split.examples,
            held_out=split.held_out,
            dropped=split.dropped,
            pad_id=next(i for i in pads if i is not None),
            fingerprint=base.fingerprint,
            adapters=adapters,
            folder=kept,
            stop=stop,
        )
        given = loaded.lent(config.device, config.precision)
        with given if model is None else nullcontext(Lent.of(model)) as lent:
            if config.packing:
                check_packing(lent.model)
            method, table = find_method(config.method), adapter_table(lent.model)
            if keep is not None:
                material = replace(material, keep=_keeping(config, base, table, keep))
            work = Work(
                config=config,
                model=lent.model,
                table=table,
                material=material,
                watcher=watcher or Silent(),
                method=config.method,
                optimizer=method.optimizer,
                rate=method.learning_rate,
            )
            return _train(config, base, lent, work, split.record)


def _keeping(
    config: TrainConfig,
    base: BaseFiles,
    table: Mapping[str, tuple[int, int]],
    keep: Callable[[int, DeltaSet, Mapping[str, float]], None],
) -> Callable[[int, Trained, Mapping[str, float]], None]:
    """Exports what is trained before it is kept."""

    def kept(step: int, trained: Trained, metrics: Mapping[str, float]) -> None:
        adapter, _ = _export(config, base, table, trained, step, None)
        record = {"method": config.method, "step": step, "seed": config.seed}
        keep(step, replace(adapter, record=record), metrics)

    return kept


def _train(
    config: TrainConfig,
    base: BaseFiles,
    lent: Lent,
    work: Work,
    data: dict[str, Any],
) -> TrainResult:
    began = time.monotonic()
    trained = find_method(config.method).train(config.parameters, work)
    seconds = time.monotonic() - began
    lent.check()
    history = work.history
    delta_set, rounding = _export(
        config, base, work.table, trained, len(history.losses), work.learning_rate
    )
    record = training_record(
        config,
        trained,
        history,
        phases=work.phases,
        learning_rate=work.learning_rate,
        data=data,
        base_fingerprint=base.fingerprint,
        device=lent.model.device.type,
    )
    record |= record_fields(rounding)
    return TrainResult(
        delta_set=replace(delta_set, record=record),
        seeds=trained.seeds,
        losses=tuple(history.losses),
        evaluations=tuple(history.evaluations),
        rounding=rounding,
        seconds=seconds,
        tokens=history.tokens,
        peak_memory=dict(work.trainee.memory),
    )


def _export(
    config: TrainConfig,
    base: BaseFiles,
    table: Mapping[str, tuple[int, int]],
    trained: Trained,
    step: int,
    rate: float | None,
) -> tuple[DeltaSet, Rounding]:
    try:
        return export(
            trained,
            table,
            base_fingerprint=base.fingerprint,
            base_name=base.name,
            value_dtype=config.value_dtype,
        )
    except DeltaError as error:
        raise DivergedError(f"a value cannot be stored: {error}", step, rate) from error


def _read(
    config: TrainConfig, tokenizer: Tokenizer, ends: Collection[int], stop: Callable[[], bool]
) -> _Split:
    """The examples in tokens, split; before the model is loaded, so that mistakes show at once."""
    data = read_examples(config.data, stop=stop)
    encoded = encode_examples(data, tokenizer, config.max_length, ends=ends, stop=stop)
    examples, held_out, dropped = encoded.fitting, [], encoded.dropped
    record: dict[str, Any] = {"digest": data.digest, "examples": len(examples)}
    if config.eval_data is not None:
        held_data = read_examples(config.eval_data, stop=stop)
        held = encode_examples(held_data, tokenizer, config.max_length, ends=ends, stop=stop)
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
