"""One attempt at a job: its files fetched, trained, told about, and what comes out handed in."""

from __future__ import annotations

import csv
import errno
import io
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gossamer.jobs.backlog import Backlog
from gossamer.jobs.views import Claim, Level, Progress
from gossamer.store.catalog.errors import QuotaExceeded, RegistryBusy, StoreFull
from gossamer.store.catalog.opening import Store
from gossamer.store.delta import DeltaSet
from gossamer.store.format import write
from gossamer.training.checkpoints import abandon, adopt
from gossamer.training.config import TrainConfig
from gossamer.training.loading import LoadedBase
from gossamer.training.progress import Evaluation, Silent, Started, Step
from gossamer.training.references import CatalogAdapters
from gossamer.training.run import TrainResult, train

log = logging.getLogger(__name__)

#: Seconds between two events of a job's steps, at least; OpenAI's clients poll them.
EVENT_SECONDS = 1.0
#: Of a result file: OpenAI's, and one of ours behind them.
_COLUMNS = (
    "step", "train_loss", "valid_loss", "valid_mean_token_accuracy", "valid_exact_match",
)  # fmt: skip
#: A disk with less than that many free bytes is full.
_FULL = 1 << 20
#: What is said by those that could not write a file and do not name the system's error.
_UNWRITTEN = ("inline_container", "PytorchStreamWriter", "iostream error", "while serializing")


class Attempt(Silent):
    """Trains what a claim asks for; watches the run itself.

    Attributes:
        given: local paths of the job's files → the field of the request that named each.
        progress: how far it is; None before the first step.
    """

    def __init__(
        self,
        store: Store,
        base: LoadedBase,
        backlog: Backlog,
        claim: Claim,
        work_dir: Path,
        lease_s: float,
    ) -> None:
        self._store = store
        self._base = base
        self._backlog = backlog
        self._claim = claim
        self._folder = work_dir / claim.job.id
        self._lease_s = lease_s
        self.given: dict[Path, str] = {}
        self.progress: Progress | None = None
        self._told = 0.0

    def run(self, stop: Callable[[], bool]) -> None:
        """Train, and hand in the result: then the job has succeeded.

        Raises:
            StoppedError: `stop` said so; what is needed to go on lies in the work folder.
            LeaseLost: the job is another's; nothing was handed in.
            CancelRequested: its tenant has cancelled it.
            TrainingError, CatalogError: it cannot be done.
            OSError: ENOSPC, the disk is full.
        """
        job = self._claim.job
        with no_room_said(self._folder), ExitStack() as stack:
            config = self._config(stack)
            folder = adopt(self._folder, self._claim.fence)
            result = train(
                config,
                self._base.files,
                loaded=self._base,
                watcher=self,
                adapters=CatalogAdapters(
                    self._store.catalog, job.tenant, fixed=job.request.references
                ),
                folder=folder,
                stop=stop,
                keep=partial(self._checkpoint, folder),
            )
            self._hand_in(result, folder)
        self.forget()

    def forget(self) -> None:
        """The job has ended, which only its holder can say: nobody goes on from here."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def abandon(self) -> None:
        """Remove what this attempt has kept. The job may be another's by now: what that one keeps
        stays."""
        abandon(self._folder, self._claim.fence)

    def _config(self, stack: ExitStack) -> TrainConfig:
        job = self._claim.job
        request = job.request
        files: dict[str, Path] = {}
        for field, name in (("data", "training_file"), ("eval_data", "validation_file")):
            file_id = getattr(request, name)
            if file_id is not None:
                opened = self._store.files.content(job.tenant, file_id, job=job.id)
                files[field] = stack.enter_context(opened)
                self.given[files[field]] = name
        return TrainConfig.of(
            method=request.method,
            parameters=dict(request.parameters),
            seed=job.seed,
            **files,
            **request.settings,
        )

    # -- what the run tells

    def started(self, event: Started) -> None:
        """Say what will be done."""
        density = event.density
        phases = ", then ".join(f"{name} {steps}" for name, steps in event.phases.items())
        message = (
            f"{event.method} trains {density.nnz:,} values, {density.of_model:.3%} of the model, "
            f"in {event.weights} weights, on {event.examples:,} examples: {phases} steps, at a "
            f"peak learning rate of {event.learning_rate:g}."
        )
        self._tell("info", message, key="started")
        if event.dropped:
            longer = f"{event.dropped:,} examples are longer than the maximum and are left out."
            self._tell("warn", longer, key="dropped")
        if event.warning:
            self._tell("warn", event.warning, key="untrainable")

    def stepped(self, event: Step) -> None:
        """Count, and say so now and then."""
        self.progress = Progress(
            event.step, event.steps, event.loss, event.tokens, remaining_s=event.eta
        )
        now = time.monotonic()
        if now - self._told >= EVENT_SECONDS or event.step in (1, event.steps):
            self._told = now
            data = {
                "step": event.step, "total_steps": event.steps, "phase": event.phase,
                "train_loss": event.loss, "learning_rate": event.learning_rate,
                "tokens_per_second": round(event.tokens_per_second, 1),
            }  # fmt: skip
            message = f"Step {event.step}/{event.steps}: training loss={event.loss:.4f}"
            self._tell("info", message, data)

    def evaluated(self, event: Evaluation) -> None:
        """Say how good it is."""
        data = {
            "step": event.step, "valid_loss": event.loss,
            "valid_mean_token_accuracy": event.token_accuracy,
            "valid_exact_match": event.exact_match,
        }  # fmt: skip
        message = f"Step {event.step}: validation loss={event.loss:.4f}"
        self._tell("info", message, data, key=f"evaluated-{event.step}")

    def _tell(
        self,
        level: Level,
        message: str,
        data: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
    ) -> None:
        """Write an event. A line of a log is not worth a job: it is left out if others write, or if
        there is no room for it."""
        try:
            self._backlog.event(self._claim, level, message, data, key=key)
        except (RegistryBusy, StoreFull) as error:
            log.warning("job %s: an event was not written: %s", self._claim.job.id, error)

    def _checkpoint(
        self, folder: Path, step: int, adapter: DeltaSet, metrics: Mapping[str, Any]
    ) -> None:
        """Make the adapter as it stands servable as `name@step-N`."""
        job = self._claim.job
        file = folder / "checkpoint.gossamer"
        write(adapter, file)
        try:
            self._store.catalog.upload(
                job.tenant, job.adapter, file, activate=False, tag=f"step-{step}",
                also=self._backlog.checkpointing(self._claim, step, metrics),
                outdated=self._backlog.outdated(self._claim, step),
            )  # fmt: skip
        except QuotaExceeded as error:
            log.info("job %s: the checkpoint %d is not kept: %s", job.id, step, error)
            message = f"No room for the checkpoint of step {step} beside the result: {error}"
            self._tell("warn", message, key="checkpoint-quota")
        file.unlink()

    # -- what comes out

    def _hand_in(self, result: TrainResult, folder: Path) -> None:
        """The metrics first: with the adapter the job has ended, and nothing may follow."""
        job, claim = self._claim.job, self._claim
        with self._store.files.spool() as spool:
            spool.write(self._metrics(result).encode())
            self._store.files.upload(
                job.tenant, "step_metrics.csv", "fine-tune-results", spool,
                also=self._backlog.attaching(claim),
            )  # fmt: skip
        # A short job has had no heartbeat since its first step.
        self._backlog.heartbeat(claim, self._lease_s, self.progress)
        file = folder / "result.gossamer"
        result.save(file)
        also = self._backlog.finishing(claim, trained_tokens=result.tokens)
        self._store.catalog.upload(job.tenant, job.adapter, file, also=also)

    def _metrics(self, result: TrainResult) -> str:
        """Of every step, those of the attempts before among them."""
        rows: dict[int, dict[str, Any]] = {
            step: {"step": step, "train_loss": loss}
            for step, loss in enumerate(result.losses, start=1)
        }
        for event in result.evaluations:
            rows.setdefault(event.step, {"step": event.step}).update(
                valid_loss=event.loss, valid_mean_token_accuracy=event.token_accuracy,
                valid_exact_match=event.exact_match,
            )  # fmt: skip
        lines = io.StringIO(newline="")
        table = csv.DictWriter(lines, _COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        for step in sorted(rows):
            table.writerow(rows[step])
        return lines.getvalue()


@contextmanager
def no_room_said(folder: Path) -> Iterator[None]:
    """Have a full disk told as the system tells it.

    What writes a checkpoint tells it in its own way: torch by a RuntimeError about positions in a
    file, safetensors by an exception of its own, shutil by a list of texts. So the disk is asked,
    if it was a file that could not be written: whatever else fails meanwhile, fails as it is.

    Args:
        folder: on that disk; it, or one above it, is there.

    Raises:
        OSError: ENOSPC
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not _unwritten(error) or shutil.disk_usage(there).free >= _FULL:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _unwritten(error: Exception) -> bool:
    """Whether a file could not be written, and the error does not say why."""
    if isinstance(error, OSError):  # shutil's is one, without a number
        return error.errno is None
    if isinstance(error, torch.OutOfMemoryError):  # a RuntimeError as well
        return False
    return any(words in str(error) for words in _UNWRITTEN)
