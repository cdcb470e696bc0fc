"""What `/v1/fine_tuning` answers: OpenAI's objects, and what ours have beside them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gossamer.api.schemas.pages import ListReply
from gossamer.jobs.methods import Declaration
from gossamer.jobs.settings import RunSettings
from gossamer.jobs.views import Checkpoint, Event, Job, Status

Seconds = Annotated[int, Field(description="Unix time.")]


class ThreeSettings(BaseModel):
    """OpenAI's three settings. `n_epochs` is null where it is no whole number."""

    n_epochs: int | None
    batch_size: int
    learning_rate_multiplier: float


class JobSettings(ThreeSettings):
    """All settings of the run, by our names but for the epochs; for these too, as `epochs`, where
    they are no whole number: OpenAI's clients expect one."""

    model_config = ConfigDict(extra="allow")


class SupervisedReply(BaseModel):
    """`method.supervised`."""

    hyperparameters: ThreeSettings


class MethodReply(BaseModel):
    """OpenAI's `method`."""

    type: Literal["supervised"] = "supervised"
    supervised: SupervisedReply


class AdapterReply(BaseModel):
    """How the job trains: its method, and all of the method's parameters."""

    model_config = ConfigDict(extra="allow")

    method: str


class JobFailure(BaseModel):
    """Why the job failed; `param` is the field of its request that is to blame."""

    code: str
    message: str
    param: str | None


class JobProgress(BaseModel):
    """How far the job is: `step` of `steps`, and the loss (nats a token) at that step."""

    step: int
    steps: int | None
    loss: float | None
    trained_tokens: int | None


class FineTuningJob(BaseModel):
    """A job. The fields from `adapter` on are ours.

    `adapter_name` is the name that its versions get: `suffix`, or the one that was made up;
    `references` are the adapters that the job begins with, as their names were understood when it
    was created; `wanted` is what the worker of a running job was asked to do and has not done yet.
    """

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: Seconds
    finished_at: Seconds | None
    estimated_finish: Seconds | None
    model: str
    status: Status
    training_file: str
    validation_file: str | None
    organization_id: str
    hyperparameters: JobSettings
    method: MethodReply
    seed: int
    result_files: list[str]
    fine_tuned_model: str | None
    trained_tokens: int | None
    error: JobFailure | None
    metadata: dict[str, str] | None
    integrations: list[Any] = []
    adapter: AdapterReply
    adapter_name: str
    references: dict[str, str]
    suffix: str | None
    started_at: Seconds | None
    wanted: Literal["cancel", "pause"] | None
    progress: JobProgress | None
    version: str | None
    digest: str | None


class JobList(ListReply):
    """The tenant's jobs, the newest first."""

    data: list[FineTuningJob]


class JobEvent(BaseModel):
    """A line of a job's log; metrics have `data`."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: Seconds
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class EventList(ListReply):
    """A job's events."""

    data: list[JobEvent]


class JobCheckpoint(BaseModel):
    """A version that can be tried while the job goes on: give `fine_tuned_model_checkpoint` as the
    model of a request."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: Seconds
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]
    digest: str


class CheckpointList(ListReply):
    """A job's checkpoints, the last first."""

    data: list[JobCheckpoint]


class MethodDeclaration(BaseModel):
    """A training method: `parameters` is the JSON schema of what it takes."""

    id: str
    object: Literal["fine_tuning.method"] = "fine_tuning.method"
    summary: str
    paper: str
    parameters: dict[str, Any]
    defaults: dict[str, Any]


class MethodList(BaseModel):
    """The training methods, and the JSON schema of the settings that all of them share."""

    object: Literal["list"] = "list"
    data: list[MethodDeclaration]
    hyperparameters: dict[str, Any]
    default_hyperparameters: dict[str, Any]


def job_reply(job: Job) -> FineTuningJob:
    """The backlog's value as a reply."""
    request, finished = job.request, job.finished_at is not None
    settings = {"n_epochs": None, **request.settings}
    if settings["epochs"] == int(settings["epochs"]):
        settings["n_epochs"] = int(settings.pop("epochs"))
    three = ThreeSettings(**{name: settings[name] for name in ThreeSettings.model_fields})
    progress = None
    if job.step is not None:
        progress = JobProgress(
            step=job.step, steps=job.steps, loss=job.loss, trained_tokens=job.trained_tokens
        )
    failure = job.error
    return FineTuningJob(
        id=job.id,
        created_at=_unix(job.created_at),
        finished_at=_unix_or_none(job.finished_at),
        estimated_finish=_unix_or_none(job.estimated_finish),
        model=request.model,
        status=job.status,
        training_file=request.training_file,
        validation_file=request.validation_file,
        organization_id=job.tenant,
        hyperparameters=JobSettings(**settings),
        method=MethodReply(supervised=SupervisedReply(hyperparameters=three)),
        seed=job.seed,
        result_files=list(job.result_files),
        fine_tuned_model=job.fine_tuned_model,
        trained_tokens=job.trained_tokens if finished else None,
        error=None
        if failure is None
        else JobFailure(code=failure.code, message=failure.message, param=failure.param),
        metadata=None if request.metadata is None else dict(request.metadata),
        adapter=AdapterReply(method=request.method, **request.parameters),
        adapter_name=job.adapter,
        references=dict(request.references),
        suffix=request.suffix,
        started_at=_unix_or_none(job.started_at),
        wanted=None if job.wanted == "continue" else job.wanted,
        progress=progress,
        version=job.version,
        digest=job.digest,
    )


def event_reply(event: Event) -> JobEvent:
    """The backlog's value as a reply."""
    return JobEvent(
        id=event.id,
        created_at=_unix(event.created_at),
        level=event.level,
        message=event.message,
        type=event.kind,
        data=None if event.data is None else dict(event.data),
    )


def checkpoint_reply(checkpoint: Checkpoint) -> JobCheckpoint:
    """The backlog's value as a reply."""
    return JobCheckpoint(
        id=checkpoint.id,
        created_at=_unix(checkpoint.created_at),
        fine_tuned_model_checkpoint=checkpoint.model,
        fine_tuning_job_id=checkpoint.job_id,
        step_number=checkpoint.step,
        metrics=dict(checkpoint.metrics),
        digest=checkpoint.digest,
    )


def methods_reply(declarations: Mapping[str, Declaration]) -> MethodList:
    """The methods that a job may use."""
    return MethodList(
        data=[
            MethodDeclaration(
                id=row.name,
                summary=row.summary,
                paper=row.paper,
                parameters=row.parameters.model_json_schema(),
                defaults=_defaults(row.parameters),
            )
            for row in declarations.values()
            if row.job
        ],
        hyperparameters=RunSettings.model_json_schema(),
        default_hyperparameters=_defaults(RunSettings),
    )


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in model.model_fields.items()
        if not field.is_required()
    }


def _unix(moment: datetime) -> int:
    return int(moment.timestamp())


def _unix_or_none(moment: datetime | None) -> int | None:
    return None if moment is None else _unix(moment)
