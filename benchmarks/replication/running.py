"""Runs of the plan that are not in the results file yet, each written as soon as it has ended."""

from __future__ import annotations

import json
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
from gossamer.base.ends import end_tokens
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
        #: the adapter of the last run on the base alone: what comes after it comes right behind it
        self._parent: tuple[str, DeltaSet] | None = None
        lines = read_csv(results) if results.is_file() else []
        self._done = {(line["run"], line["judged"]): line for line in lines}

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those that have not been run.

        Raises:
            ValueError: one has been run otherwise than it would be now.
        """
        missing = []
        for run in runs:
            found = [self._done.get((run.key, task)) for task in run.judged]
            for line in found:
                if line is not None:
                    self._check(run, line)
            if None in found:
                missing.append(run)
        return missing

    def run(self, run: Run) -> list[Line]:
        """Train, judge, and write the lines of it."""
        result, foreign = None, float("nan")
        if run.arm not in (BASE, CHOICE):
            config, parent = self._config(run), None
            if run.after is not None:
                parent = self._adapter(run.after)
            with Meter() as meter:
                result = self._trained(run, config, parent)
            foreign = meter.foreign
        lines = []
        for task in run.judged:
            judged = self._judged(run, task, None if result is None else result.delta_set)
            lines.append(self._line(run, task, judged, result, foreign))
        append_csv(self._results, lines)
        self._done |= {(line["run"], line["judged"]): line for line in lines}
        return lines

    def _check(self, run: Run, line: Line) -> None:
        """Whether a line is of what the run would do now."""
        now = {
            "settings": _settings(run),
            "examples": str(self._examples),
            "held_out": str(self._held_out),
            "base": self._base.fingerprint,
        }
        for name, value in now.items():
            if line[name] != value:
                raise ValueError(
                    f"{run.key} has been run with another {name}: {line[name]} instead of {value}; "
                    "give the arm another name, or take its lines out of the results"
                )

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
            ends = end_tokens(self._tokenizer, self._model.generation_config)
            held_out = read_examples(held_out_file)
            found = encode_examples(held_out, self._tokenizer, 512, ends=ends)
            self._data[name, seed] = Data(task, train_file, held_out_file, tuple(found.fitting))
        return self._data[name, seed]

    def _config(self, run: Run) -> TrainConfig:
        return TrainConfig.of(data=self._of(run.task, run.seed).train, **run.settings())

    def _trained(self, run: Run, config: TrainConfig, parent: DeltaSet | None) -> TrainResult:
        result = train(
            config,
            self._base,
            model=self._model,
            tokenizer=self._tokenizer,
            adapters=lambda _: _required(parent),
        )
        if run.after is None:
            self._parent = (run.key, result.delta_set)
        return result

    def _adapter(self, run: Run) -> DeltaSet:
        """What a run on the base alone makes; made again if an earlier process made it."""
        if self._parent is None or self._parent[0] != run.key:
            return self._trained(run, self._config(run), None).delta_set
        return self._parent[1]

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
        self, run: Run, task: str, judged: Judged, result: TrainResult | None, foreign: float
    ) -> Line:
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
            "seconds": "0" if result is None else f"{result.seconds:.1f}",
            "foreign": f"{foreign:.2f}",
            "settings": _settings(run),
            "base": self._base.fingerprint,
            **Provenance.here().columns(),
        }


def _settings(run: Run) -> str:
    """All settings of a run, defaults and all, as JSON."""
    if run.arm in (BASE, CHOICE):
        return "{}"
    config = TrainConfig.of(data=Path(), **run.settings())
    return json.dumps(config.model_dump(mode="json", exclude={"data", "eval_data"}), sort_keys=True)


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
