"""What a training step costs: `python -m benchmarks.training_cost [--csv FILE]`.

Speed: the sparse step beside PEFT's LoRA and SHiRA, with as many parameters in the same weights, on
the same batch. All three take turns in one process. Memory: the largest resident set of a process
that makes a few steps, sparse or all of the model's weights, AdamW in both cases.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.common import Meter, Provenance, markdown, write_csv
from gossamer.base.load import BaseFiles, load_model
from gossamer.base.patch_map import adapter_table
from gossamer.base.sources import open_base
from gossamer.store.format import seeded_positions
from gossamer.training.batches import collate
from gossamer.training.encode import Encoded
from gossamer.training.gating import gated_mlps, recomputing
from gossamer.training.methods.sparta import shares
from gossamer.training.methods.targets import match_targets
from gossamer.training.sparse import SparseLinear, attached
from gossamer.training.trainee import Trainee

RANK = 8
ROWS, TOKENS = 4, 128
#: the trainer's
ATTENTION = "sdpa"
#: target names as PEFT takes them → as ours
TARGETS = {"all-linear": "all-linear", "v_proj,o_proj": "v,o", "q_proj,v_proj": "q,v"}

Step = Callable[[], None]


@dataclass(frozen=True)
class Line:
    """One row of the results."""

    what: str
    targets: str
    parameters: int
    value: float
    unit: str
    of: str
    ratio: float | None
    target: str
    foreign: float


def batch(vocabulary: int) -> dict[str, Tensor]:
    """What the trainer makes of so many examples of so many tokens, every one of them trained."""
    drawn = np.random.default_rng(0).integers(vocabulary, size=(ROWS, TOKENS))
    trained = np.arange(TOKENS) > 0
    return collate([Encoded(ids, trained) for ids in drawn], pad_id=0)


def stepping(model: nn.Module, inputs: dict[str, Tensor], parameters: list[nn.Parameter],
             after: Step) -> Step:  # fmt: skip
    """Forward, backward and an update; the loss is the trainer's, whoever's the layers are."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    trainee = Trainee(model)

    def step() -> None:
        trainee(**inputs)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after()

    return step


def sparse(stack: ExitStack, base: BaseFiles, targets: str, nnz: int) -> Step:
    """Ours, the positions drawn at random."""
    model = load_model(base, attention=ATTENTION)
    table = match_targets(targets, adapter_table(model))
    sizes = {name: rows * columns for name, (rows, columns) in table.items()}

    def make(name: str, count: int) -> Callable[[nn.Linear], SparseLinear]:
        where = torch.from_numpy(seeded_positions(0, name, sizes[name], count))
        return lambda linear: SparseLinear(linear, where, written=True)

    made = {name: make(name, count) for name, count in shares(sizes, nnz).items()}
    stack.enter_context(recomputing(gated_mlps(model)))
    layers = stack.enter_context(attached(model, made)).values()
    values = [values for layer in layers for values in layer.trained]

    def write() -> None:
        for layer in layers:
            layer.write()

    return stepping(model, batch(model.config.vocab_size), values, write)


def peft_step(base: BaseFiles, config: Any) -> tuple[Step, int]:
    """PEFT's, and how many parameters it trains."""
    model = get_peft_model(load_model(base, attention=ATTENTION), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    made = stepping(model, batch(model.config.vocab_size), trained, lambda: None)
    return made, sum(p.numel() for p in trained)


def speed(base: BaseFiles, rounds: int) -> Iterator[Line]:
    """Sparse, LoRA and SHiRA in turns."""
    for peft_targets, ours in TARGETS.items():
        named = peft_targets if peft_targets == "all-linear" else peft_targets.split(",")
        with ExitStack() as stack:
            lora, nnz = peft_step(base, LoraConfig(r=RANK, target_modules=named))
            # SHiRA does not know the name of all of them.
            layers = named if named != "all-linear" else _linear_layers(base)
            shira, shira_nnz = peft_step(base, ShiraConfig(r=RANK, target_modules=layers))
            contenders = {"sparse": sparse(stack, base, ours, nnz), "LoRA": lora, "SHiRA": shira}
            taken: dict[str, list[float]] = {name: [] for name in contenders}
            with Meter() as meter:
                for turn in range(rounds + 1):
                    for name, step in contenders.items():
                        start = time.perf_counter()
                        step()
                        if turn:
                            taken[name].append(1e3 * (time.perf_counter() - start))
        medians = {name: statistics.median(times) for name, times in taken.items()}
        counts = {"sparse": nnz, "LoRA": nnz, "SHiRA": shira_nnz}
        for name, milliseconds in medians.items():
            ratio = None if name == "sparse" else milliseconds / medians["sparse"]
            wanted = {"LoRA": ">= 0.9", "SHiRA": ">= 2"}.get(name, "")
            yield Line(f"step, {name}", ours, counts[name], milliseconds, "ms", "sparse step",
                       ratio, wanted, meter.foreign)  # fmt: skip
        del contenders, lora, shira
        gc.collect()


def _linear_layers(base: BaseFiles) -> list[str]:
    return sorted({name.split(".")[-2] for name in adapter_table(load_model(base))})


def memory(base_name: str, data_dir: Path) -> Iterator[Line]:
    """A process for each, so that none inherits another's."""
    found = {}
    for kind in ("full", "sparse"):
        command = [sys.executable, "-m", "benchmarks.training_cost", "--child", kind,
                   "--base", base_name, "--data-dir", str(data_dir)]  # fmt: skip
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        found[kind] = json.loads(answer.stdout.splitlines()[-1])
    for kind, (nbytes, count) in found.items():
        ratio = None if kind == "full" else nbytes / found["full"][0]
        wanted = "" if kind == "full" else "<= 0.6"
        yield Line(f"memory, {kind}", "all-linear", count, nbytes / 2**20, "MiB",
                   "full fine-tuning", ratio, wanted, 0.0)  # fmt: skip


def child(kind: str, base: BaseFiles) -> None:
    """A few steps, then the most that this process has held."""
    with ExitStack() as stack:
        if kind == "full":
            model = load_model(base, attention=ATTENTION)
            model.requires_grad_(requires_grad=True)
            stack.enter_context(recomputing(gated_mlps(model)))
            parameters = list(model.parameters())
            count = sum(p.numel() for p in parameters)
            step = stepping(model, batch(model.config.vocab_size), parameters, lambda: None)
        else:
            count = 1_061_683  # 1 % of the model
            step = sparse(stack, base, "all-linear", count)
        for _ in range(4):
            step()
    print(json.dumps([1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, count]))


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--data-dir", type=Path, default=Path("~/.gossamer").expanduser())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--child", choices=("full", "sparse"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    base = open_base(options.base, options.data_dir)
    if options.child:
        child(options.child, base)
        return
    lines = [*memory(options.base, options.data_dir), *speed(base, options.rounds)]
    table = [[line.what, line.targets, f"{line.parameters:,}", f"{line.value:,.0f} {line.unit}",
              "" if line.ratio is None else f"{line.ratio:.2f} of {line.of}", line.target]
             for line in lines]  # fmt: skip
    print(markdown(["", "targets", "parameters", "", "ratio", "target"], table))
    if options.csv:
        here = Provenance.here((*("torch", "transformers"), "peft")).columns()
        write_csv(options.csv, [{**vars(line), **here} for line in lines])


if __name__ == "__main__":
    main()
