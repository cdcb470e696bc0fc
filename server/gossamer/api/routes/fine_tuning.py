"""`/v1/fine_tuning`: jobs that train adapters, and what can be asked for.

The jobs are queued here and carried out by workers, which are other processes.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from gossamer.api.context import context_of
from gossamer.api.documented import errors
from gossamer.api.errors import ApiError, invalid
from gossamer.api.schemas.fine_tuning import (
    METADATA_KEY,
    METADATA_PARAMETER,
    CheckpointsQuery,
    CreateJob,
    EventsQuery,
    JobsQuery,
)
from gossamer.api.schemas.jobs import (
    CheckpointList,
    EventList,
    FineTuningJob,
    JobList,
    MethodList,
    checkpoint_reply,
    event_reply,
    job_reply,
    methods_reply,
)
from gossamer.api.schemas.pages import page_of
from gossamer.api.services import ServicesOf
from gossamer.api.strict import StrictRoute
from gossamer.jobs.methods import DECLARATIONS

router = APIRouter(tags=["fine-tuning"], route_class=StrictRoute)

_JOB = "/v1/fine_tuning/jobs/{job_id}"
#: of metadata, OpenAI's and the backlog's: what is longer matches no job
_LONGEST_KEY, _LONGEST_VALUE = 64, 512


@router.get("/v1/fine_tuning/methods", responses=errors())
async def list_methods() -> MethodList:
    """The training methods, with what each one takes."""
    return methods_reply(DECLARATIONS)


@router.post("/v1/fine_tuning/jobs", responses=errors(404, 408, 413, 422, 429, 507))
async def create_job(body: CreateJob, request: Request, services: ServicesOf) -> FineTuningJob:
    """Queue a job. The same request again within a minute is the same job."""
    tenant = context_of(request.scope).tenant
    wanted = await services.job_reader.read(tenant, body)
    return job_reply(await services.workers.query(services.backlog.submit, tenant, wanted))


@router.get("/v1/fine_tuning/jobs", responses=errors(), openapi_extra=METADATA_PARAMETER)
async def list_jobs(
    request: Request, services: ServicesOf, query: Annotated[JobsQuery, Query()]
) -> JobList:
    """The tenant's jobs, the newest first."""
    tenant = context_of(request.scope).tenant
    metadata, without = _read_metadata(query.model_extra or {})
    page = await services.workers.query(
        services.backlog.list,
        tenant,
        after=query.after,
        limit=query.limit,
        metadata=metadata,
        without_metadata=without,
    )
    return JobList(**page_of([job_reply(job) for job in page.items], has_more=page.has_more))


@router.get(_JOB, responses=errors(404))
async def show_job(job_id: str, request: Request, services: ServicesOf) -> FineTuningJob:
    """One job, as it stands."""
    tenant = context_of(request.scope).tenant
    return job_reply(await services.workers.query(services.backlog.get, tenant, job_id))


@router.post(_JOB + "/cancel", responses=errors(404, 409, 507))
async def cancel_job(job_id: str, request: Request, services: ServicesOf) -> FineTuningJob:
    """End a job: at once if it does not run, else as soon as its worker hears of it."""
    tenant = context_of(request.scope).tenant
    return job_reply(await services.workers.query(services.backlog.cancel, tenant, job_id))


@router.post(_JOB + "/pause", responses=errors(404, 409, 507))
async def pause_job(job_id: str, request: Request, services: ServicesOf) -> FineTuningJob:
    """Put a job aside: at once if it does not run, else when its worker has kept what it has."""
    tenant = context_of(request.scope).tenant
    return job_reply(await services.workers.query(services.backlog.pause, tenant, job_id))


@router.post(_JOB + "/resume", responses=errors(404, 409, 507))
async def resume_job(job_id: str, request: Request, services: ServicesOf) -> FineTuningJob:
    """Put a paused job back into the queue."""
    tenant = context_of(request.scope).tenant
    return job_reply(await services.workers.query(services.backlog.resume, tenant, job_id))


@router.get(_JOB + "/events", responses=errors(404))
async def list_events(
    job_id: str, request: Request, services: ServicesOf, query: Annotated[EventsQuery, Query()]
) -> EventList:
    """A job's log, the newest first unless `order` is `asc`."""
    tenant = context_of(request.scope).tenant
    page = await services.workers.query(
        services.backlog.events,
        tenant,
        job_id,
        after=query.after,
        limit=query.limit,
        order=query.order,
    )
    return EventList(**page_of([event_reply(e) for e in page.items], has_more=page.has_more))


@router.get(_JOB + "/checkpoints", responses=errors(404))
async def list_checkpoints(
    job_id: str,
    request: Request,
    services: ServicesOf,
    query: Annotated[CheckpointsQuery, Query()],
) -> CheckpointList:
    """A job's checkpoints that can be asked, the last first unless `order` is `asc`."""
    tenant = context_of(request.scope).tenant
    page = await services.workers.query(
        services.backlog.checkpoints,
        tenant,
        job_id,
        after=query.after,
        limit=query.limit,
        order=query.order,
    )
    found = [checkpoint_reply(checkpoint) for checkpoint in page.items]
    return CheckpointList(**page_of(found, has_more=page.has_more))


def _read_metadata(extra: dict[str, Any]) -> tuple[dict[str, str], bool]:
    """The filter by metadata: the pairs, and whether only jobs without any are wanted.

    Raises:
        ApiError: 400, also for every other field of the query.
    """
    pairs: dict[str, str] = {}
    without = False
    for name, value in extra.items():
        match = METADATA_KEY.fullmatch(name)
        if name != "metadata" and match is None:
            raise invalid(name, f"Unknown field {name!r}.", code="unknown_field")
        if match is None:
            if value != "null":
                raise _bad_metadata()
            without = True
        else:
            if not isinstance(value, str) or "\0" in name + value:
                raise _bad_metadata()
            pairs[match[1]] = value
    if (without and pairs) or any(
        len(key) > _LONGEST_KEY or len(value) > _LONGEST_VALUE for key, value in pairs.items()
    ):
        raise _bad_metadata()
    return pairs, without


def _bad_metadata() -> ApiError:
    return invalid(
        "metadata",
        "Write metadata[key]=value, each key once and of at most 64 characters, with a value of at "
        "most 512; or metadata=null, alone.",
    )
