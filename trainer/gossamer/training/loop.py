"""One phase of a run: transformers' Trainer around the base with the layers that are trained.

The Trainer owns the order of the data, accumulation, clipping, checkpoints and going on from them.
Ours are the parameters, the schedule (which may go on over phases) and what is told to whom.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from gossamer.training.batches import collate, pack
from gossamer.training.checkpoints import PhaseFolder, load_layers, save_layers, step_of
from gossamer.training.config import TrainConfig
from gossamer.training.data import never
from gossamer.training.encode import Encoded
from gossamer.training.errors import DivergedError, StoppedError
from gossamer.training.optimizing import Optimizer, Schedule, new_optimizer
from gossamer.training.order import Order
from gossamer.training.progress import Evaluation, Step, Watcher
from gossamer.training.sparse import TrainedLayer
from gossamer.training.trainee import Trainee, autocast, evaluate

#: Seconds between two checkpoints, at least; and they may take this share of the time.
CHECKPOINT_SECONDS, CHECKPOINT_SHARE = 30.0, 0.05

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """What `run_phase` needs besides the config.

    Attributes:
        name: for progress and errors.
        trainee: the base, the trained layers attached.
        layers: these, by base weight name.
        parameters: what the optimiser moves.
        examples: to train on.
        first_example: how many of their endless shuffled row have been seen before.
        held_out: evaluated before the first step of the run, after its last one, and every
            `eval_steps` of its last phase; may be empty.
        pad_id: any token; it is masked.
        optimizer, schedule, steps: how.
        first_step, all_steps: where the phase lies in the run.
        first_token: how many tokens the phases before have processed.
        nnz: of the adapter.
        watcher: is told.
        scratch: a folder that the Trainer may write to.
        folder: where checkpoints are kept; None: there are none.
        stop: asked after each step, and before each batch of an evaluation; True: end with a
            checkpoint.
        after_step: is given the step of the phase, from 1, and the batches that it was made of.
        keep, keep_every: in the run's last phase, is given the step of the run and its metrics
            every so many steps, but for the last.
    """

    name: str
    trainee: Trainee
    layers: Mapping[str, TrainedLayer]
    parameters: Sequence[torch.nn.Parameter]
    examples: Sequence[Encoded]
    first_example: int
    held_out: Sequence[Encoded]
    pad_id: int
    optimizer: Optimizer
    schedule: Schedule
    steps: int
    first_step: int
    first_token: int
    all_steps: int
    nnz: int
    watcher: Watcher
    scratch: Path
    folder: PhaseFolder | None = None
    stop: Callable[[], bool] = never
    after_step: Callable[[int, Sequence[Batch]], None] | None = None
    keep: Callable[[int, Mapping[str, float]], None] | None = None
    keep_every: int = 1

    @property
    def is_last(self) -> bool:
        """Whether the run ends with it."""
        return self.first_step + self.steps == self.all_steps


@dataclass
class History:
    """What happened: the loss of each step, the evaluations, and the seconds of the steps."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> History:
        """From its JSON values."""
        evaluations = [Evaluation(**one) for one in values["evaluations"]]
        return cls(list(values["losses"]), evaluations, values["seconds"], values["tokens"])

    def add(self, other: History) -> None:
        """What happened after."""
        self.losses += other.losses
        self.evaluations += other.evaluations
        self.seconds += other.seconds
        self.tokens += other.tokens


class _Examples(Dataset[Encoded]):
    def __init__(self, examples: Sequence[Encoded]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Encoded:
        return self._examples[index]


class _PhaseTrainer(Trainer):
    """The Trainer, with our parameters in the place of the model's."""

    def __init__(self, config: TrainConfig, phase: Phase, args: TrainingArguments) -> None:
        make = pack if config.packing else partial(collate, pad_id=phase.pad_id)
        super().__init__(
            model=phase.trainee,
            args=args,
            data_collator=make,
            train_dataset=_Examples(phase.examples),
        )
        self._config = config
        self._phase = phase
        #: of the update that is being made; kept for `after_step` only
        self.batches: list[Batch] = []

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:  # noqa: ARG002
        """Of the phase's parameters alone; the layers follow each of its steps."""
        if self.optimizer is None:
            phase = self._phase
            made = new_optimizer(
                phase.optimizer, phase.parameters, phase.schedule.peak, self._config.weight_decay
            )
            made.register_step_post_hook(lambda *_: _write(phase.layers.values()))
            self.optimizer = made
        return self.optimizer

    def create_scheduler(
        self,
        num_training_steps: int,  # noqa: ARG002
        optimizer: Any = None,
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The phase's part of the run's schedule."""
        if self.lr_scheduler is None:
            factor = self._phase.schedule.factor
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Order:  # noqa: ARG002
        """The run's order of the examples."""
        phase = self._phase
        return Order(len(phase.examples), self._config.seed, phase.first_example)

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Remember the batch, for whoever looks at the step."""
        if self._phase.after_step is not None:
            self.batches.append(dict(inputs))
        return super().training_step(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        """What is trained, and nothing of the base."""
        save_layers(self._phase.layers, Path(str(output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        """What `_save` kept."""
        load_layers(self._phase.layers, Path(resume_from_checkpoint))

    def autocast_smart_context_manager(
        self,
        cache_enabled: bool | None = True,  # noqa: ARG002
    ) -> AbstractContextManager[Any]:
        """16-bit products on request; accelerate's own way would wrap the base's forward."""
        return autocast(self._config, self.args.device)


def _write(layers: Iterable[TrainedLayer]) -> None:
    for layer in layers:
        layer.write()


class _Reporter(TrainerCallback):
    """Tells the watcher, keeps the history, asks whether to stop, and when to save."""

    def __init__(self, config: TrainConfig, phase: Phase, history: History) -> None:
        self._config = config
        self._phase = phase
        self._history = history
        self.trainer: _PhaseTrainer | None = None
        self._since = 0.0
        self._saved, self._save_took = time.monotonic(), 0.0
        self._stopping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._phase.trainee.tokens = self._history.tokens
        step = int(state.global_step)
        if not step and not self._phase.first_step:
            self._evaluate(0)
        elif step and self._phase.is_last and self._is_unmeasured(step):
            self._on_the_way(step, self._history.losses[-1])  # it was stopped there
        self._since = self._saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        logs = given.get("logs")
        if not logs or "loss" not in logs:
            return
        loss, step, rate = float(logs["loss"]), int(state.global_step), logs["learning_rate"]
        whole = self._phase.first_step + step
        if not torch.isfinite(torch.tensor(loss)):
            raise DivergedError(f"its loss is {loss}", whole, rate)
        history, phase = self._history, self._phase
        history.losses.append(loss)
        history.tokens = phase.trainee.tokens
        history.seconds += time.monotonic() - self._since
        self._since = time.monotonic()
        seconds = max(history.seconds, 1e-9)
        phase.watcher.stepped(
            Step(
                step=whole,
                steps=phase.all_steps,
                phase=phase.name,
                loss=loss,
                learning_rate=rate,
                tokens=phase.first_token + history.tokens,
                tokens_per_second=history.tokens / seconds,
                eta=seconds / step * (phase.all_steps - whole),
                nnz=phase.nnz,
                memory=phase.trainee.memory[phase.name],
            )
        )
        if phase.is_last:
            try:
                self._on_the_way(step, loss)
            except StoppedError:
                # The step is kept without its evaluation, which whoever goes on begins with.
                self._stopping = True
                control.should_training_stop = True
                control.should_save = phase.folder is not None
                self._saved = time.monotonic()
            self._since = time.monotonic()

    def _on_the_way(self, step: int, loss: float) -> None:
        """What happens every so many steps of the last phase, and at its end."""
        phase = self._phase
        metrics = {"step": float(phase.first_step + step), "train_loss": loss}
        if self._is_unmeasured(step):
            self._evaluate(step)
            measured = self._history.evaluations[-1]
            metrics["valid_loss"] = measured.loss
            metrics["valid_mean_token_accuracy"] = measured.token_accuracy
            metrics["valid_exact_match"] = measured.exact_match
        if step == phase.steps:
            return  # what comes next is the result
        if phase.keep is not None and step % phase.keep_every == 0:
            phase.keep(phase.first_step + step, metrics)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        # the fullest moment but for the forward pass's end: every gradient is there
        self._phase.trainee.look_at_memory()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
        step = int(state.global_step)
        if self._phase.after_step is not None and self.trainer is not None:
            batches, self.trainer.batches = self.trainer.batches, []
            self._phase.after_step(step, batches)
        if step >= self._phase.steps:
            return control
        self._stopping = self._stopping or self._phase.stop()
        if self._stopping:
            control.should_training_stop = True
        if self._phase.folder is not None:
            waited = time.monotonic() - self._saved
            due = waited > max(CHECKPOINT_SECONDS, self._save_took / CHECKPOINT_SHARE)
            control.should_save = due or self._stopping
            if control.should_save:
                self._saved = time.monotonic()
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self._phase.folder is not None:
            self._phase.folder.seal(int(state.global_step), asdict(self._history))
            self._save_took = time.monotonic() - self._saved
            self._saved = self._since = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        step = int(state.global_step)
        if self._stopping:
            whole = self._phase.first_step + step
            raise StoppedError(whole, resumable=self._phase.folder is not None)

    def finish(self) -> None:
        """Do what is left where the last step has been made: its evaluation."""
        phase = self._phase
        if phase.is_last and self._is_unmeasured(phase.steps):
            self._evaluate(phase.steps)

    def _is_unmeasured(self, step: int) -> bool:
        """Whether an evaluation is due after a step of the last phase, and was not made."""
        phase, every = self._phase, self._config.eval_steps
        if not phase.held_out or not (
            step == phase.steps or (every is not None and step % every == 0)
        ):
            return False
        whole = phase.first_step + step
        return all(made.step != whole for made in self._history.evaluations)

    def _evaluate(self, step: int) -> None:
        phase = self._phase
        if not phase.held_out:
            return
        whole = phase.first_step + step
        try:
            result = evaluate(
                self._config, phase.trainee, phase.held_out, phase.pad_id, whole, stop=phase.stop
            )
        except StoppedError as error:
            raise StoppedError(whole, resumable=phase.folder is not None) from error
        self._history.evaluations.append(result)
        phase.watcher.evaluated(result)


def run_phase(config: TrainConfig, phase: Phase) -> History:
    """Train the layers of the phase in place, going on from its newest checkpoint.

    Raises:
        DivergedError: the loss is no longer finite.
        StoppedError: `stop` said so.
    """
    found = None if phase.folder is None else phase.folder.latest()
    history = History() if found is None else History.of(found[1])
    reporter = _Reporter(config, phase, history)
    if found is not None and step_of(found[0]) == phase.steps:
        # It was stopped in its last evaluation; the Trainer would make another step.
        load_layers(phase.layers, found[0])
        reporter.finish()
        return history
    trainer = _PhaseTrainer(config, phase, _arguments(config, phase))
    reporter.trainer = trainer
    phase.trainee.enter(phase.name)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(reporter)
    trainer.train(resume_from_checkpoint=None if found is None else str(found[0]))
    return history


def _arguments(config: TrainConfig, phase: Phase) -> TrainingArguments:
    device = next(phase.trainee.parameters()).device
    arguments = TrainingArguments(
        output_dir=str(phase.scratch if phase.folder is None else phase.folder.path),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_steps=phase.steps,
        learning_rate=phase.schedule.peak,
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
