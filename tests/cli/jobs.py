"""Jobs on the live server: created by the command line, carried out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.jobs.backlog import Backlog
from gossamer.jobs.views import Claim, JobError, Progress
from tests.api.hand import LEASE, Hand
from tests.cli.running import Live, run_json


def create_job(env: Mapping[str, str], data: Path, *options: str | Path) -> dict[str, Any]:
    """`gossamer jobs create`; the job."""
    job: dict[str, Any] = run_json("jobs", "create", "--data", data, *options, env=env)
    return job


class LiveHand:
    """A worker's side of the live server's queue, move by move. It has one job at a time."""

    def __init__(self, live: Live, hand: Hand) -> None:
        self._live = live
        self._hand = hand
        self._claim: Claim | None = None

    @property
    def backlog(self) -> Backlog:
        """The queue."""
        return self._hand.backlog

    @property
    def held(self) -> Claim:
        """What was taken last."""
        assert self._claim is not None
        return self._claim

    def take(self, job_id: str) -> None:
        """Claim the job, which must be the one whose turn it is."""
        self._claim = self._hand.claim(job_id)

    def take_next(self) -> bool:
        """Claim the job whose turn it is, if there is one."""
        self._claim = self.backlog.claim("by-hand", LEASE)
        return self._claim is not None

    def step(self, step: int, steps: int = 4) -> None:
        """Report a step, as the worker does."""
        loss = 2.0 / step
        progress = Progress(step, steps, loss, 10 * step, remaining_s=60.0)
        self.backlog.heartbeat(self.held, LEASE, progress)
        data = {
            "step": step,
            "total_steps": steps,
            "phase": "train",
            "train_loss": loss,
            "learning_rate": 1e-3,
            "tokens_per_second": 123.4,
        }
        message = f"Step {step}/{steps}: training loss={loss:.4f}"
        self.backlog.event(self.held, "info", message, data)

    def evaluated(self, step: int) -> None:
        """Report what the held-out examples say after a step."""
        data = {
            "step": step, "valid_loss": 1.5, "valid_mean_token_accuracy": 0.25,
            "valid_exact_match": 0.125,
        }  # fmt: skip
        message = f"Step {step}: validation loss=1.5000"
        self.backlog.event(self.held, "info", message, data, key=f"evaluated-{step}")

    def checkpoint(self, step: int) -> None:
        """Upload `name@step-<step>`."""
        metrics = {"step": step, "train_loss": 0.5}
        self._hand.checkpoint(self.held, step, self._live.make_file(step), metrics)

    def finish(self, seed: int) -> None:
        """Let the job succeed with `make_file(…, seed)`."""
        self._hand.finish(self.held, self._live.make_file(seed), trained_tokens=40)

    def fail(self, error: JobError) -> None:
        """Let the job fail."""
        self.backlog.fail(self.held, error)
