"""`/v1/fine_tuning`: OpenAI's requests, and what ours have beside them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from gossamer.api.schemas.common import RequestModel, Text
from gossamer.api.schemas.pages import Cursor, Order, QueryModel
from gossamer.jobs.requests import MAX_PAIRS, MAX_SUFFIX

_SETTINGS = (
    "OpenAI's `n_epochs`, `batch_size` and `learning_rate_multiplier`, each a number or `auto`, "
    "and every other setting of a run (`GET /v1/fine_tuning/methods` lists them)."
)
Settings = Annotated[dict[str, Any], Field(description=_SETTINGS)]


def _none_of(what: str) -> AfterValidator:
    def check(given: list[Any] | None) -> list[Any] | None:
        if given:
            raise ValueError(f"{what} are not offered")
        return given

    return AfterValidator(check)


class Supervised(RequestModel):
    """`method.supervised`."""

    hyperparameters: Settings | None = None


class TrainingMethod(RequestModel):
    """OpenAI's `method`: which data there is. How to train on it is for `adapter` to say."""

    type: Literal["supervised"]
    supervised: Supervised | None = None


class AdapterOrder(RequestModel):
    """How to train: a method, and its parameters beside it.

    `GET /v1/fine_tuning/methods` lists the methods and what each one takes.
    """

    model_config = ConfigDict(extra="allow")

    method: Text = "sparta"


class CreateJob(RequestModel):
    """A job to queue."""

    model: Text = Field(description="The base: `base`, or its own name.")
    training_file: Text = Field(description="Id of a file with the purpose `fine-tune`.")
    validation_file: Text | None = None
    suffix: str | None = Field(
        default=None,
        description=f"Name of the adapter to make, of at most {MAX_SUFFIX} characters; a job makes "
        "a new version of one that exists.",
    )
    seed: int | None = Field(default=None, description="0 to 2³²-1; drawn when it is not given.")
    hyperparameters: Settings | None = None
    method: TrainingMethod | None = None
    metadata: dict[str, str] | None = Field(default=None, description=f"At most {MAX_PAIRS} pairs.")
    integrations: Annotated[list[Any] | None, _none_of("integrations")] = None
    adapter: AdapterOrder | None = None


class JobsQuery(QueryModel):
    """Which jobs to list. `metadata[key]=value` is read apart: no field can have such a name."""

    model_config = ConfigDict(extra="allow")

    after: Cursor | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 20


class EventsQuery(QueryModel):
    """Which events to list; `asc` and `after` the last one seen follow a job."""

    after: Cursor | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 20
    order: Order = "desc"


class CheckpointsQuery(QueryModel):
    """Which checkpoints to list."""

    after: Cursor | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 10
    order: Order = "desc"


#: OpenAPI of `metadata`, which no field of a query can be
METADATA_PARAMETER: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "required": False,
            "style": "deepObject",
            "explode": True,
            "description": "`metadata[key]=value`: jobs that have all of these pairs; "
            "`metadata=null`: jobs that have none.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}
METADATA_KEY = re.compile(r"metadata\[(.*)\]", re.DOTALL)
