"""Why a job failed, in words for its tenant: no path, no name of a class, no trace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from gossamer.jobs.errors import JobsError
from gossamer.jobs.settings import RunSettings
from gossamer.jobs.views import JobError
from gossamer.store.catalog.errors import CatalogError, QuotaExceeded, StoreFull
from gossamer.store.spool import NO_ROOM
from gossamer.training.errors import (
    AdapterError,
    ConfigError,
    DataError,
    DensityError,
    DivergedError,
    NotSelectedError,
    TrainingError,
    UnknownTargetError,
    UntrainableBaseError,
)


def job_error(error: BaseException, given: Mapping[Path, str]) -> JobError:
    """What the tenant is told.

    Args:
        error: what ended the attempt.
        given: local paths of the job's files → the field of the request that named each.
    """
    if isinstance(error, DataError):
        return _data_error(error, given)
    if isinstance(error, ConfigError):
        field = _request_field(error.field)
        return JobError("invalid_parameter", f"{field}: {error.problem}", field)
    if isinstance(error, QuotaExceeded):
        return JobError("quota_exceeded", str(error))
    if isinstance(error, StoreFull) or (isinstance(error, OSError) and error.errno in NO_ROOM):
        return JobError("disk_full", "There is no room left to keep the job's result.")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return JobError(
            "out_of_memory",
            "The job needs more memory than the worker has; smaller batches, shorter examples or "
            "gradient_checkpointing need less.",
            "hyperparameters",
        )
    if isinstance(error, TrainingError):
        return _training_error(error)
    if isinstance(error, CatalogError | JobsError):
        return JobError("store_failed", str(error))
    return JobError("internal_error", "The worker failed; the reason is in its log.")


def _training_error(error: TrainingError) -> JobError:
    code, param = "training_failed", None
    match error:
        case AdapterError():
            code, param = "invalid_adapter", f"adapter.{error.field}".removesuffix(".")
        case DensityError():
            code, param = "invalid_parameter", f"adapter.{error.field}"
        case UnknownTargetError():
            code, param = "invalid_parameter", "adapter.targets"
        case NotSelectedError():
            code, param = "invalid_parameter", "adapter.warmup_steps"
        case UntrainableBaseError():
            code, param = "unsupported_base", "model"
        case DivergedError():
            code, param = "training_diverged", "hyperparameters"
    return JobError(code, _words(error), param)


def _request_field(field: str) -> str:
    """A field of a run's config → where the request for the job has it."""
    part, dot, rest = field.partition(".")
    if part == "parameters":
        return f"adapter{dot}{rest}"
    return f"hyperparameters.{field}" if part in RunSettings.model_fields else field


def _data_error(error: DataError, given: Mapping[Path, str]) -> JobError:
    param = given.get(error.file, "training_file")
    where = [f"line {error.line}"] if error.line is not None else []
    where += [error.field] if error.field is not None else []
    place = f" ({', '.join(where)})" if where else ""
    code = f"invalid_{param}"
    return JobError(code, f"The {param} cannot be used{place}: {error.problem}.", param)


def _words(error: TrainingError) -> str:
    what, why, remedy = error.what, error.why, error.remedy
    return f"{what[:1].upper()}{what[1:]}: {why}. {remedy}."
