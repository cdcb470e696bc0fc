"""The loop: transformers' Trainer around a frozen base with sparse layers.

The Trainer owns the schedule, accumulation, clipping and the order of the data. It is given a thin
module around the base, not the base itself, so that nothing it does to its model stays on the base.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate depends on it
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from gossamer.training.batches import IGNORED, collate
from gossamer.training.config import TrainConfig
from gossamer.training.encode import Encoded
from gossamer.training.errors import DivergedError
from gossamer.training.progress import Evaluation, Step, Watcher
from gossamer.training.sparse import SparseLinear

TRAINER_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
}


class Trainee(nn.Module):
    """The base as the Trainer sees it: batches of `collate` in, the loss out."""

    #: tells the Trainer that the loss is divided by the tokens of the whole update already
    accepts_loss_kwargs = True

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = base
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(base.forward).parameters
        #: bytes, at the fullest seen so far
        self.memory = 0
        #: tokens processed so far, padding not counted
        self.tokens = 0

    def train(self, mode: bool = True) -> Trainee:  # noqa: ARG002
        """Stay in eval mode: no dropout, so that what is trained is what is served."""
        return self

    def forward(
        self, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **inputs: Tensor
    ) -> dict[str, Tensor]:
        """The loss in nats, summed over the labels and divided by `num_items_in_batch`."""
        logits = self.logits(labels.shape[1], inputs)
        flat = labels.reshape(-1)
        loss = F.cross_entropy(
            logits.reshape(flat.numel(), -1), flat, ignore_index=IGNORED, reduction="sum"
        )
        self.memory = max(self.memory, memory_in_use(loss.device))
        self.tokens += int(inputs["attention_mask"].sum())
        count = (flat != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": loss / count}

    def logits(self, scored: int, inputs: dict[str, Tensor]) -> Tensor:
        """float32 [rows, scored, vocabulary] of the last positions."""
        kept: dict[str, Any] = {"logits_to_keep": scored} if self._takes_logits_to_keep else {}
        logits: Tensor = self.base(**inputs, **kept, use_cache=False).logits
        return logits[:, -scored:].float()


def memory_in_use(device: torch.device) -> int:
    """Bytes: allocated on a GPU at most so far, or held by this process now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


@dataclass(frozen=True)
class Task:
    """What `run_loop` needs besides the config.

    Attributes:
        trainee: the base, its sparse layers attached.
        layers: these, by base weight name.
        examples: to train on.
        held_out: to evaluate on; may be empty.
        pad_id: any token; it is masked.
        learning_rate: the peak.
        watcher: is told.
        scratch: a folder that the Trainer may write to; nothing in it is kept.
    """

    trainee: Trainee
    layers: dict[str, SparseLinear]
    examples: Sequence[Encoded]
    held_out: Sequence[Encoded]
    pad_id: int
    learning_rate: float
    watcher: Watcher
    scratch: Path


@dataclass
class History:
    """What happened: the loss of each step, and the evaluations."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)


class _Examples(Dataset[Encoded]):
    def __init__(self, examples: Sequence[Encoded]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Encoded:
        return self._examples[index]


class _SparseTrainer(Trainer):
    """The Trainer, with values in the place of weights."""

    def __init__(self, config: TrainConfig, task: Task, args: TrainingArguments) -> None:
        super().__init__(
            model=task.trainee,
            args=args,
            data_collator=partial(collate, pad_id=task.pad_id),
            train_dataset=_Examples(task.examples),
        )
        self._config = config
        self._task = task

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:  # noqa: ARG002
        """AdamW on the values alone; the weights follow each of its steps."""
        if self.optimizer is None:
            values = [layer.values for layer in self._task.layers.values()]
            self.optimizer = torch.optim.AdamW(
                values, lr=self.args.learning_rate, weight_decay=self._config.weight_decay
            )
            self.optimizer.register_step_post_hook(self._write)
        return self.optimizer

    def _write(self, *_: Any) -> None:
        for layer in self._task.layers.values():
            layer.write()

    def autocast_smart_context_manager(
        self,
        cache_enabled: bool | None = True,  # noqa: ARG002
    ) -> AbstractContextManager[Any]:
        """16-bit products on request; accelerate's own way would wrap the base's forward."""
        return autocast(self._config, self.args.device)


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which forward passes run."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


class _Reporter(TrainerCallback):
    """Turns the Trainer's events into ours, and stops a run that cannot come to anything."""

    def __init__(self, config: TrainConfig, task: Task, history: History) -> None:
        self._config = config
        self._task = task
        self._history = history
        self._nnz = sum(layer.values.numel() for layer in task.layers.values())
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._evaluate(0)
        self._began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        logs = given.get("logs")
        if not logs or "loss" not in logs:
            return
        loss, step, rate = float(logs["loss"]), int(state.global_step), logs["learning_rate"]
        if not torch.isfinite(torch.tensor(loss)):
            raise DivergedError(f"its loss is {loss}", step, rate)
        self._history.losses.append(loss)
        seconds = max(time.monotonic() - self._began, 1e-9)
        self._task.watcher.stepped(
            Step(
                step=step,
                steps=int(state.max_steps),
                loss=loss,
                learning_rate=rate,
                tokens=self._task.trainee.tokens,
                tokens_per_second=self._task.trainee.tokens / seconds,
                eta=seconds / step * (state.max_steps - step),
                nnz=self._nnz,
                memory=self._task.trainee.memory,
            )
        )
        every = self._config.eval_steps
        if every is not None and step % every == 0 and step < state.max_steps:
            paused = time.monotonic()
            self._evaluate(step)
            self._began += time.monotonic() - paused

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._evaluate(int(state.global_step))

    def _evaluate(self, step: int) -> None:
        if self._task.held_out:
            result = evaluate(self._config, self._task, step)
            self._history.evaluations.append(result)
            self._task.watcher.evaluated(result)


@torch.no_grad()
def evaluate(config: TrainConfig, task: Task, step: int) -> Evaluation:
    """Loss and token accuracy on the held-out examples, as the model stands."""
    device = task.trainee.base.device
    loss, right, count = 0.0, 0, 0
    for begin in range(0, len(task.held_out), config.batch_size):
        rows = task.held_out[begin : begin + config.batch_size]
        batch = {key: tensor.to(device) for key, tensor in collate(rows, task.pad_id).items()}
        labels = batch.pop("labels")
        with autocast(config, device):
            logits = task.trainee.logits(labels.shape[1], batch)
        scored = labels != IGNORED
        chosen, wanted = logits[scored], labels[scored]
        loss += float(F.cross_entropy(chosen, wanted, reduction="sum"))
        right += int((chosen.argmax(-1) == wanted).sum())
        count += wanted.numel()
    return Evaluation(step, loss / count, right / count, count)


def run_loop(config: TrainConfig, task: Task) -> History:
    """Train the values of `task.layers` in place.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    history = History()
    trainer = _SparseTrainer(config, task, _arguments(config, task))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Reporter(config, task, history))
    trainer.train()
    return history


def steps_of(config: TrainConfig, examples: int) -> int:
    """How many updates a run over that many examples makes, as the Trainer counts them."""
    if config.max_steps is not None:
        return config.max_steps
    batches = -(-examples // config.batch_size)
    updates = -(-batches // config.gradient_accumulation)
    return max(1, int(-(-config.epochs * updates // 1)))


def _arguments(config: TrainConfig, task: Task) -> TrainingArguments:
    device = task.trainee.base.device
    steps = steps_of(config, len(task.examples))
    arguments = TrainingArguments(
        output_dir=str(task.scratch),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_steps=steps,
        learning_rate=task.learning_rate,
        lr_scheduler_type=TRAINER_SCHEDULES[config.schedule],
        warmup_steps=round(config.warmup * steps),
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
    )
    if arguments.n_gpu > 1:
        # several GPUs in one process would mean DataParallel, which copies the layers
        arguments._n_gpu = 1  # noqa: SLF001
    return arguments
