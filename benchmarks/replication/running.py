"""Runs of the plan that are not in the results file yet, each written as soon as it has ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from benchmarks.common import Meter, Provenance, append_csv, read_csv
from benchmarks.replication.judging import Judged, judge, judge_by_choice, patched
from benchmarks.replication.plan import BASE, CHOICE, EXAMPLES, HELD_OUT, Run
from benchmarks.tasks import TASKS, Task, write_training_file
from gossamer.base.load import BaseFiles, load_model, load_tokenizer
from gossamer.store.delta import DeltaSet
from gossamer.training import TrainConfig
from gossamer.training.data import read_examples
from gossamer.training.encode import Encoded, encode_examples
from gossamer.training.run import TrainResult, train

Line = dict[str, str]
MakeTask = Callable[[Path, int, int], Task]


@dataclass(frozen=True)
class Data:
    """A task's examples of one seed.

    Attributes:
        train, held_out: files of examples.
        encoded: the held-out ones in tokens.
    """

    task: Task
    train: Path
    held_out: Path
    encoded: tuple[Encoded, ...]


class Runner:
    """Trains and judges.

    Args:
        base: the base model.
        folder: for the examples' files and the corpora.
        results: the results file; a run all of whose lines are there is not run again.
        tasks: name → maker of a task.
        examples, held_out: how many.
    """

    def __init__(
        self,
        base: BaseFiles,
        folder: Path,
        results: Path,
        *,
        tasks: Mapping[str, MakeTask] = TASKS,
        examples: int = EXAMPLES,
        held_out: int = HELD_OUT,
    ) -> None:
        self._base = base
        self._folder = folder
        self._results = results
        self._tasks = tasks
        self._examples = examples
        self._held_out = held_out
        self._data: dict[tuple[str, int], Data] = {}
        #: the adapter that was made last: what comes after a run comes right behind it
        self._last: tuple[str, DeltaSet] | None = None
        lines = read_csv(results) if results.is_file() else []
        self._done = {(line["run"], line["judged"]) for line in lines}

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those that have not been run."""
        return [
            run for run in runs if any((run.key, task) not in self._done for task in run.judged)
        ]

    def run(self, run: Run) -> list[Line]:
        """Train, judge, and write the lines of it."""
        with Meter() as meter:
            if run.arm in (BASE, CHOICE):
                result, seconds = None, 0.0
            else:
                began = time.monotonic()
                result = self._trained(run)
                seconds = time.monotonic() - began
        lines = []
        for task in run.judged:
            judged = self._judged(run, task, None if result is None else result.delta_set)
            lines.append(self._line(run, task, judged, result, seconds, meter.foreign))
        append_csv(self._results, lines)
        self._done |= {(run.key, task) for task in run.judged}
        return lines

    # -- its parts

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_model(self._base, attention="sdpa")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._base)

    def _of(self, name: str, seed: int) -> Data:
        if (name, seed) not in self._data:
            task = self._tasks[name](self._folder, seed, self._held_out)
            task = replace(task, train=task.train[: self._examples])
            if len(task.train) < self._examples or len(task.held_out) < self._held_out:
                raise ValueError(f"{name} has too few examples")
            train_file = write_training_file(task, self._folder / f"{name}-{seed}.jsonl")
            held_out_file = write_training_file(
                replace(task, train=task.held_out), self._folder / f"{name}-{seed}-held-out.jsonl"
            )
            found = encode_examples(read_examples(held_out_file), self._tokenizer, 512)
            self._data[name, seed] = Data(task, train_file, held_out_file, tuple(found.fitting))
        return self._data[name, seed]

    def _config(self, run: Run) -> TrainConfig:
        return TrainConfig.of(data=self._of(run.task, run.seed).train, **run.settings())

    def _trained(self, run: Run) -> TrainResult:
        parent = None if run.after is None else self._adapter(run.after)
        result = train(
            self._config(run),
            self._base,
            model=self._model,
            tokenizer=self._tokenizer,
            adapters=lambda _: _required(parent),
        )
        self._last = (run.key, result.delta_set)
        return result

    def _adapter(self, run: Run) -> DeltaSet:
        """What a run makes; made again if an earlier process made it."""
        if self._last is None or self._last[0] != run.key:
            return self._trained(run).delta_set
        return self._last[1]

    def _judged(self, run: Run, name: str, adapter: DeltaSet | None) -> Judged:
        data = self._of(name, run.seed)
        if run.arm == CHOICE:
            return judge_by_choice(self._model, self._tokenizer, data.task)
        config = TrainConfig.of(data=data.train, parameters={})
        if adapter is None:
            return judge(config, self._model, data.encoded)
        with patched(self._model, adapter):
            return judge(config, self._model, data.encoded)

    def _line(
        self, run: Run, task: str, judged: Judged, result: TrainResult | None, seconds: float,
        foreign: float,
    ) -> Line:  # fmt: skip
        settings = run.settings() if result is not None else {}
        return {
            "run": run.key,
            "arm": run.arm.name,
            "task": run.task,
            "seed": str(run.seed),
            "after": "" if run.after is None else run.after.key,
            "judged": task,
            "examples": str(self._examples),
            "held_out": str(len(judged.right)),
            "accuracy": f"{judged.accuracy:.4f}",
            "loss": f"{judged.loss:.4f}",
            "outcomes": packed(judged.right),
            "trained": "0" if result is None else str(result.record["density"]["nnz"]),
            "steps": "0" if result is None else str(len(result.losses)),
            "tokens": "0" if result is None else str(result.tokens),
            "seconds": f"{seconds:.1f}",
            "foreign": f"{foreign:.2f}",
            "settings": json.dumps(settings, sort_keys=True),
            **Provenance.here().columns(),
        }


def _required(adapter: DeltaSet | None) -> DeltaSet:
    if adapter is None:
        raise ValueError("this run begins with the base alone")
    return adapter


def packed(right: Iterable[bool]) -> str:
    """Bits, the first example's the highest of the first byte, as hexadecimal digits."""
    return bytes(np.packbits(np.fromiter(right, dtype=bool))).hex()


def unpacked(line: Line) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """What was packed: bool [held_out]."""
    octets = np.frombuffer(bytes.fromhex(line["outcomes"]), np.uint8)
    return np.unpackbits(octets, count=int(line["held_out"])).astype(bool)
