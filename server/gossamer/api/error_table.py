"""The one table from the other rooms' errors to HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gossamer.api.errors import (
    NO_RETRY,
    ApiError,
    internal,
    invalid,
    invalid_api_key,
    model_not_found,
    over_quota,
    unavailable,
)
from gossamer.engine import errors as engine
from gossamer.jobs import errors as jobs
from gossamer.merge import errors as merge
from gossamer.store import errors as store
from gossamer.store.catalog import errors as catalog

_SOON = 1.0
_LATER = 5.0

Row = Callable[[Any], ApiError]


def to_api_error(error: BaseException) -> ApiError:
    """What to answer for `error`. What the table does not know is a 500 without details."""
    if isinstance(error, ApiError):
        return error
    row = next((_TABLE[cls] for cls in type(error).__mro__ if cls in _TABLE), None)
    return row(error) if row is not None else internal()


def known(error: BaseException) -> bool:
    """Whether the table has an answer of its own for `error`."""
    return isinstance(error, ApiError) or any(cls in _TABLE for cls in type(error).__mro__)


def field_errors(errors: Sequence[Any]) -> ApiError:
    """400 for what pydantic found: the first error, by field. Values are never repeated."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part not in _LOCATIONS]
    param = ".".join(part for part in path if part not in _TAGS) or None
    kind = first["type"]
    if kind == "extra_forbidden":
        hint = _NOT_OFFERED.get(path[-1], "The server does not know this field.")
        return invalid(param, f"Unknown field {param!r}. {hint}", code="unknown_field")
    if kind == "missing":
        what = f"The field {param!r} is missing." if param else _NO_BODY
        return invalid(param, what, code="missing_field")
    if kind == "json_invalid":
        return invalid(None, f"The body is not valid JSON: {first['ctx']['error']}.")
    if param is None:
        return invalid(None, _NO_BODY)
    why = first["msg"].removeprefix("Value error, ")
    return invalid(param, f"{param}: {why}.", code="invalid_value")


_NO_BODY = "The body must be a JSON object, sent with `content-type: application/json`."
_LOCATIONS = frozenset({"body", "query", "path", "header"})
#: how pydantic names the branches of our unions; a client has not written them
_TAGS = frozenset(
    {"text", "texts", "tokens", "token lists", "parts"}
    | {"str", "constrained-str", "list[constrained-str]", "dict[str,any]"}
)
_NOT_OFFERED = {
    "tools": "Tools are not offered.",
    "tool_choice": "Tools are not offered.",
    "functions": "Tools are not offered.",
    "function_call": "Tools are not offered.",
    "tool_calls": "Tools are not offered.",
    "suffix": "Insertion is not offered: the base continues texts only.",
    "chat_template": "Only the base's own chat template is rendered.",
    "chat_template_kwargs": "Only the base's own chat template is rendered.",
    "guided_json": "Use `structured_outputs`.",
    "guided_regex": "Use `structured_outputs`.",
    "guided_choice": "Use `structured_outputs`.",
    "guided_grammar": "Use `structured_outputs`.",
}


def _conflict(code: str, param: str | None = None) -> Row:
    # The OpenAI client repeats a 409 by itself, and these would only conflict again.
    return lambda error: ApiError(409, str(error), code=code, param=param, headers=NO_RETRY)


def _bad(param: str, code: str) -> Row:
    return lambda error: invalid(param, str(error), code=code)


def _adapter_file(error: store.AdapterFileError) -> ApiError:
    where = f" (tensor {error.tensor!r}" if error.tensor is not None else ""
    if error.position is not None:
        where += f"{', ' if where else ' ('}position {error.position}"
    status = 413 if error.code == "adapter_too_large" else 422
    message = error.message + (where + ")" if where else "")
    return ApiError(status, message, code=error.code, param="file")


def _quota(error: catalog.QuotaExceeded) -> ApiError:
    status = 409 if error.what in ("adapters", "files") else 413
    return ApiError(status, str(error), code="quota_exceeded", headers=NO_RETRY)


#: what the backlog calls a part of its request → where OpenAI's request has it
_PARTS = {"parameters": "adapter", "settings": "hyperparameters"}


def _parameter(error: jobs.ParameterError) -> ApiError:
    part, dot, rest = error.field.partition(".")
    param = _PARTS.get(part, part) + dot + rest
    return invalid(param, f"{param}: {error.problem}.", code="invalid_value")


def _not_there(code: str, param: str) -> Row:
    return lambda error: ApiError(404, str(error), code=code, param=param)


def _unloaded(error: engine.AdapterUnavailable) -> ApiError:
    if known(error.cause):
        return to_api_error(error.cause)
    return unavailable("An adapter of the request could not be loaded.", _LATER, code="load_failed")


def _non_finite(error: engine.NonFiniteLogits) -> ApiError:
    return ApiError(
        500, str(error), type="server_error", code="non_finite_logits", headers=NO_RETRY
    )


def _no_space(error: catalog.StoreFull) -> ApiError:
    message = f"No space is left for the {error.where}."
    return ApiError(507, message, type="server_error", code="store_full", headers=NO_RETRY)


_FULL = "The device has no room for an adapter of the request at the moment."

_TABLE: dict[type[BaseException], Row] = {
    engine.ContextLengthExceeded: _bad("max_tokens", "context_length_exceeded"),
    engine.InvalidRequest: lambda e: invalid(e.field, str(e), code="invalid_value"),
    engine.Overloaded: lambda e: unavailable(str(e), e.retry_after),
    engine.AdapterTooLarge: lambda e: unavailable(str(e), _LATER, code="adapter_too_large"),
    engine.DeviceFull: lambda _: unavailable(_FULL, _LATER, code="out_of_memory"),
    engine.AdapterUnavailable: _unloaded,
    engine.NonFiniteLogits: _non_finite,
    engine.ShuttingDown: lambda e: unavailable(str(e), _SOON, code="shutting_down"),
    engine.Cancelled: lambda e: unavailable(str(e), _SOON, code="cancelled"),
    engine.StepFailed: lambda _: internal(),
    merge.MixError: lambda e: invalid("model", e.message, code=e.code),
    store.AdapterFileError: _adapter_file,
    catalog.AdapterNotFound: lambda e: model_not_found(e.given),
    catalog.InvalidName: _bad("name", "invalid_name"),
    catalog.ReservedName: _bad("name", "reserved_name"),
    catalog.UploadTooLarge: lambda e: ApiError(413, str(e), code="request_too_large"),
    catalog.QuotaExceeded: _quota,
    catalog.UploadInterrupted: lambda e: ApiError(409, str(e), code="upload_interrupted"),
    catalog.CurrentVersion: _conflict("current_version"),
    catalog.NoEarlierVersion: _conflict("no_earlier_version"),
    catalog.NoIncrement: _conflict("no_increment", "increment"),
    catalog.WrongBase: lambda e: ApiError(422, str(e), code="base_model_mismatch", param="model"),
    catalog.AdapterCorrupt: _conflict("adapter_corrupt", "model"),
    catalog.FileNotFound: _not_there("file_not_found", "file_id"),
    catalog.InvalidFilename: _bad("file", "invalid_filename"),
    catalog.FileCorrupt: _conflict("file_corrupt", "file_id"),
    catalog.BlobStoreFailed: lambda _: unavailable("The blob store failed.", _LATER),
    catalog.StoreFull: _no_space,
    catalog.RegistryBusy: lambda e: unavailable(str(e), _SOON, code="registry_busy"),
    catalog.InvalidKey: lambda _: invalid_api_key(),
    jobs.ParameterError: _parameter,
    jobs.UnknownMethod: _bad("adapter.method", "invalid_value"),
    jobs.UnusableFile: lambda e: invalid(e.param, str(e), code="unusable_file"),
    jobs.JobNotFound: _not_there("job_not_found", "fine_tuning_job_id"),
    jobs.UnknownCursor: _bad("after", "invalid_value"),
    jobs.JobStateError: _conflict("invalid_job_state"),
    jobs.TooManyJobs: lambda e: over_quota(str(e)),
}

#: the base classes of all rows: what the application registers its handler for
HANDLED: tuple[type[Exception], ...] = (
    ApiError,
    engine.EngineError,
    catalog.CatalogError,
    jobs.JobsError,
    merge.MixError,
    store.AdapterFileError,
)
