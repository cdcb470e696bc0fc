"""What training gains on the tasks of the demo: base with a constrained choice, base free, adapter.

One line of benchmarks/results/task_gains.csv for each (task, seed); lines that are there already
are not computed again, so a run that was interrupted goes on. The merge of the adapters of a seed,
half of each, is measured on both tasks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from benchmarks.common import RESULTS, Meter, Provenance, read_csv, write_csv
from benchmarks.tasks import TASKS, Task, write_training_file
from gossamer.base.load import load_model, load_tokenizer
from gossamer.base.sources import DEFAULT_BASE, open_base
from gossamer.store.delta import DeltaSet
from gossamer.training import TrainConfig
from gossamer.training.run import train

ROWS = 20


@torch.no_grad()
def free(model: PreTrainedModel, tokenizer: Tokenizer, task: Task) -> float:
    """Accuracy of the greedy continuations."""
    texts: list[str] = []
    for begin in range(0, len(task.held_out), ROWS):
        prompts = [item.prompt for item in task.held_out[begin : begin + ROWS]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        ids = model.generate(**batch, max_new_tokens=task.max_tokens, do_sample=False)
        new = ids[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return task.accuracy(texts)


@torch.no_grad()
def constrained(model: PreTrainedModel, tokenizer: Tokenizer, task: Task) -> float:
    """Accuracy of the likeliest of each item's choices."""
    texts = []
    for item in task.held_out:
        prompt = tokenizer(item.prompt)["input_ids"]
        answers = [tokenizer(choice)["input_ids"] for choice in item.choices]
        width = max(map(len, answers))
        rows = [prompt + answer + [0] * (width - len(answer)) for answer in answers]
        logits = model(torch.tensor(rows), logits_to_keep=width + 1).logits.log_softmax(-1)
        scores = [
            sum(float(logits[row, at, token]) for at, token in enumerate(answer))
            for row, answer in enumerate(answers)
        ]
        texts.append(item.choices[scores.index(max(scores))])
    return task.accuracy(texts)


@contextmanager
def patched(model: PreTrainedModel, parts: Sequence[tuple[DeltaSet, float]]) -> Iterator[None]:
    """The model with weighted adapters added densely, and as it was afterwards."""
    names = {name for delta_set, _ in parts for name in delta_set.deltas}
    saved = {name: model.get_parameter(name).detach().clone() for name in names}
    try:
        with torch.no_grad():
            for delta_set, weight in parts:
                for name, delta in delta_set.deltas.items():
                    model.get_parameter(name).add_(torch.from_numpy(delta.dense()), alpha=weight)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in saved.items():
                model.get_parameter(name).copy_(tensor)


def measure(options: argparse.Namespace, seed: int, say: Callable[[dict[str, str]], None]) -> None:
    """Train both tasks with one seed, and judge everything."""
    base = open_base(options.base, options.data_dir)
    model, tokenizer = load_model(base, attention="sdpa"), load_tokenizer(base)
    made: dict[str, tuple[Task, DeltaSet]] = {}
    for index, (name, make) in enumerate(TASKS.items()):
        if options.task not in (None, name):
            continue
        task = make(options.data_dir / "demo", seed, options.items)
        file = write_training_file(task, options.data_dir / f"{name}-{seed}.jsonl")
        settings: dict[str, Any] = {**task.settings, **json.loads(options.settings)}
        config = TrainConfig.of(data=file, seed=2 * seed + index, **settings)
        with Meter() as meter:
            result = train(config, base, model=model, tokenizer=tokenizer)
        made[name] = task, result.delta_set
        with patched(model, [(result.delta_set, 1.0)]):
            adapter = free(model, tokenizer, task)
        line = {
            "task": name,
            "seed": str(seed),
            "items": str(options.items),
            "base_free": "" if options.adapter_only else f"{free(model, tokenizer, task):.3f}",
            "base_constrained": ""
            if options.adapter_only
            else f"{constrained(model, tokenizer, task):.3f}",
            "adapter": f"{adapter:.3f}",
            "mix": "",
            "steps": str(len(result.losses)),
            "tokens": str(result.tokens),
            "last_loss": f"{result.record['loss']['mean_of_last_tenth']:.4f}",
            "nnz": str(result.delta_set.nnz),
            "seconds": f"{result.seconds:.1f}",
            "foreign": f"{meter.foreign:.2f}",
            "settings": json.dumps(settings, sort_keys=True),
        }
        if len(made) == len(TASKS):
            with patched(model, [(delta_set, 0.5) for _, delta_set in made.values()]):
                for other, (its, _) in made.items():
                    line["mix"] += f"{other} {free(model, tokenizer, its):.3f} "
        say(line)


def main() -> None:
    """Measure the seeds that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--task", choices=tuple(TASKS))
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--data-dir", type=Path, default=Path.home() / ".cache/gossamer/demo")
    parser.add_argument("--settings", default="{}", help="JSON that overrides the tasks' settings")
    parser.add_argument("--adapter-only", action="store_true", help="do not judge the base")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "task_gains.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.data_dir.mkdir(parents=True, exist_ok=True)
    lines = read_csv(options.out) if options.out.is_file() else []
    columns = Provenance.here().columns()

    def say(line: dict[str, str]) -> None:
        print({key: value for key, value in line.items() if value}, flush=True)
        lines.append({**line, **columns})
        write_csv(options.out, lines)

    for seed in options.seeds:
        if not any(line["seed"] == str(seed) for line in lines):
            measure(options, seed, say)


if __name__ == "__main__":
    main()
