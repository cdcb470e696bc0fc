"""What the backlog answers: small frozen values, safe to keep and to pass on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

#: OpenAI's. A job goes to the queue at once, and its files are checked by the worker, so that
#: `validating_files` is not among the states that ours pass.
Status = Literal[
    "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
]
#: what a worker hears of its tenant
Order = Literal["continue", "cancel", "pause"]
Level = Literal["info", "warn", "error"]
EventKind = Literal["message", "metrics"]


@dataclass(frozen=True)
class JobLimits:
    """What a backlog allows.

    Attributes:
        unfinished: jobs of one tenant that are queued, running or paused.
        max_attempts: workers that may die over a job before it fails.
        same_request_s: seconds in which an identical request of a tenant is the same job.
        events: of one job that are kept; past it old metrics are thinned.
        checkpoints: of one job that are kept, the last ones, and what unfinished jobs refer to.
    """

    unfinished: int = 16
    max_attempts: int = 5
    same_request_s: float = 60.0
    events: int = 10_000
    checkpoints: int = 5


@dataclass(frozen=True)
class RequestView:
    """What was asked for, as it was checked when it was submitted.

    Attributes:
        model: the base model, as the request names it.
        method, parameters, settings: for `methods.find_declaration(…).read` and `RunSettings.of`.
        references: what the parameters' adapters meant when the job was submitted: the reference as
            given → `name@sha256:…`.
        suffix: the adapter's name, if one was asked for.
    """

    model: str
    method: str
    parameters: Mapping[str, Any]
    settings: Mapping[str, Any]
    references: Mapping[str, str]
    training_file: str
    validation_file: str | None
    suffix: str | None
    metadata: Mapping[str, str] | None


@dataclass(frozen=True)
class JobError:
    """Why a job failed, as its tenant is told.

    Attributes:
        code: machine-readable.
        param: the field of the request that it is about: `training_file`, …
    """

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far a worker is.

    Attributes:
        step: updates made, of `steps`.
        loss: nats per trained token at the last of them; one that is not finite is left out.
        trained_tokens: until now, in all phases, padding not counted.
        remaining_s: seconds until it is finished, as far as the worker can tell.
    """

    step: int
    steps: int
    loss: float | None = None
    trained_tokens: int | None = None
    remaining_s: float | None = None


@dataclass(frozen=True)
class Job:
    """One training job.

    Attributes:
        id: `ftjob-<24 hex digits>`.
        wanted: what a running job's worker was asked to do and has not done yet.
        seed: the one asked for, or the one that was drawn.
        adapter: the name that its versions and checkpoints get.
        started_at: of its first attempt.
        attempt: how many workers have begun it, those not counted that gave it back.
        step, steps, loss: the last progress that was reported.
        fine_tuned_model: the adapter's name, once it succeeded.
        version, digest: of the version that it made: `sql:3`, `sha256:…`.
        result_files: ids of the files that it wrote for its tenant.
    """

    id: str
    tenant: str
    status: Status
    wanted: Order | None
    request: RequestView
    seed: int
    adapter: str
    base_fingerprint: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    estimated_finish: datetime | None
    attempt: int
    step: int | None
    steps: int | None
    loss: float | None
    trained_tokens: int | None
    error: JobError | None
    fine_tuned_model: str | None
    version: str | None
    digest: str | None
    result_files: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """A worker's right to a job, until its lease ends or somebody else has a later one.

    Attributes:
        fence: larger than that of every claim of the job before.
    """

    job: Job
    worker: str
    fence: int


@dataclass(frozen=True)
class Event:
    """A line of a job's log. `step` and `data` are those of metrics."""

    id: str
    job_id: str
    created_at: datetime
    level: Level
    kind: EventKind
    message: str
    step: int | None
    data: Mapping[str, Any] | None


@dataclass(frozen=True)
class Checkpoint:
    """A version that a job made on its way.

    Attributes:
        model: what to ask for: `name@step-<n>`.
        digest: of that version when it was made.
    """

    id: str
    job_id: str
    step: int
    model: str
    digest: str
    metrics: Mapping[str, Any]
    created_at: datetime
