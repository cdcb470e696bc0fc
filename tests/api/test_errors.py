"""The table from errors to HTTP: complete, in OpenAI's shape, and silent about internals."""

from __future__ import annotations

import inspect
import json
from types import ModuleType

import pytest

from gossamer.api.error_table import known, to_api_error
from gossamer.api.errors import ApiError, invalid, model_not_found, retry_headers
from gossamer.engine import errors as engine
from gossamer.jobs import errors as jobs
from gossamer.merge import errors as merge
from gossamer.store import errors as store
from gossamer.store.catalog import errors as catalog

#: raised at the start of a process or inside the store only; a request never meets them
NOT_FOR_REQUESTS = {
    engine.UnsupportedModel,
    merge.MissingMemberError,
    store.ChainError,
    store.DeltaError,
    catalog.AlreadyOwned,
    catalog.BlobCorrupt,
    catalog.BlobMissing,
    catalog.BlobMoving,
    catalog.BlobsNotOurs,
    catalog.BlobsUrlInvalid,
    catalog.KeyNotFound,
    catalog.KeySecretUnsafe,
    catalog.NotOwner,
    catalog.RegistryTooNew,
    catalog.TenantExists,
    catalog.TenantNotFound,
    jobs.CancelRequested,
    jobs.LeaseLost,
}
BASES = {engine.EngineError, catalog.CatalogError, jobs.JobsError}


def classes(module: ModuleType) -> list[type[Exception]]:
    found = inspect.getmembers(module, inspect.isclass)
    return [c for _, c in found if issubclass(c, Exception) and c.__module__ == module.__name__]


@pytest.mark.parametrize(
    "error",
    [c for m in (engine, merge, store, catalog, jobs) for c in classes(m)],
    ids=lambda c: c.__name__,
)
def test_every_error_of_a_request_has_a_row(error: type[Exception]) -> None:
    expected = error not in NOT_FOR_REQUESTS and error not in BASES
    assert known(error.__new__(error)) == expected


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (engine.ContextLengthExceeded(5, 9, 8), 400, "context_length_exceeded"),
        (engine.InvalidRequest("stop", "no"), 400, "invalid_value"),
        (engine.Overloaded("full", 2.5), 503, "overloaded"),
        (engine.AdapterTooLarge("d", 2, 1), 503, "adapter_too_large"),
        (engine.NonFiniteLogits("sha256:0"), 500, "non_finite_logits"),
        (engine.StepFailed("secret detail"), 500, "internal_error"),
        (engine.ShuttingDown("bye"), 503, "shutting_down"),
        (engine.AdapterUnavailable("d", RuntimeError("secret detail")), 503, "load_failed"),
        (
            engine.AdapterUnavailable("d", catalog.AdapterCorrupt("sha256:0", "gone")),
            409,
            "adapter_corrupt",
        ),
        (engine.AdapterUnavailable("d", catalog.AdapterNotFound("sql")), 404, "model_not_found"),
        (store.AdapterFileError("unsupported_module", "no"), 422, "unsupported_module"),
        (store.AdapterFileError("adapter_too_large", "no"), 413, "adapter_too_large"),
        (catalog.AdapterNotFound("sql"), 404, "model_not_found"),
        (catalog.QuotaExceeded("adapters", 101, 100), 409, "quota_exceeded"),
        (catalog.QuotaExceeded("bytes", 101, 100), 413, "quota_exceeded"),
        (catalog.QuotaExceeded("files", 101, 100), 409, "quota_exceeded"),
        (catalog.QuotaExceeded("file bytes", 101, 100), 413, "quota_exceeded"),
        (catalog.FileNotFound("file-1"), 404, "file_not_found"),
        (catalog.FileCorrupt("file-1", "gone"), 409, "file_corrupt"),
        (catalog.InvalidFilename("", "no"), 400, "invalid_filename"),
        (jobs.JobNotFound("ftjob-1"), 404, "job_not_found"),
        (jobs.JobStateError("ftjob-1", "pause", "failed"), 409, "invalid_job_state"),
        (jobs.TooManyJobs(16), 429, "insufficient_quota"),
        (jobs.UnknownCursor("x"), 400, "invalid_value"),
        (jobs.UnknownMethod("x", ["lota"]), 400, "invalid_value"),
        (jobs.UnusableFile("training_file", "file-1", "is gone"), 400, "unusable_file"),
        (jobs.ParameterError("suffix", "no"), 400, "invalid_value"),
        (catalog.StoreFull("blobs", "/secret/detail"), 507, "store_full"),
        (catalog.BlobStoreFailed("put", "secret detail"), 503, "overloaded"),
        (catalog.RegistryBusy(5), 503, "registry_busy"),
        (catalog.InvalidKey(), 401, "invalid_api_key"),
        (RuntimeError("secret detail"), 500, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_rows(error: Exception, status: int, code: str) -> None:
    answer = to_api_error(error)
    assert (answer.status_code, answer.code) == (status, code)
    reply = answer.response()
    body = json.loads(bytes(reply.body))
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in body["error"]["message"]
    if status == 503:
        assert int(reply.headers["retry-after"]) >= 1
        assert int(reply.headers["retry-after-ms"]) >= 1


def test_what_a_retry_cannot_cure_says_so() -> None:
    for error in (
        catalog.QuotaExceeded("adapters", 101, 100),
        catalog.CurrentVersion("sql", 1),
        catalog.AdapterCorrupt("sha256:0", "gone"),
        catalog.FileCorrupt("file-1", "gone"),
        jobs.JobStateError("ftjob-1", "pause", "failed"),
        jobs.TooManyJobs(16),
        engine.NonFiniteLogits("sha256:0"),
    ):
        assert to_api_error(error).response().headers["x-should-retry"] == "false"
    assert "x-should-retry" not in to_api_error(engine.Overloaded("full", 1)).response().headers


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("settings.eval_fraction", "hyperparameters.eval_fraction"),
        ("parameters", "adapter"),
        ("parameters.targets", "adapter.targets"),
        ("metadata.settings", "metadata.settings"),
        ("suffix", "suffix"),
    ],
)
def test_a_parameter_is_named_as_the_request_has_it(field: str, param: str) -> None:
    assert to_api_error(jobs.ParameterError(field, "no")).param == param


def test_not_found_reads_the_same_from_the_catalog_and_from_the_parser() -> None:
    given = "acme/sql"
    assert (
        to_api_error(catalog.AdapterNotFound(given)).content() == model_not_found(given).content()
    )


@pytest.mark.parametrize("text", ["\ud800", "\x00\r\n", "é🦋", "n" * 10_000])
def test_any_text_can_be_answered(text: str) -> None:
    body = bytes(model_not_found(text).response().body)
    assert body.isascii()
    assert len(body) < 2500
    assert json.loads(body)["error"]["code"] == "model_not_found"
    invalid(text, text).response()


def test_advice_on_retrying_stays_below_what_clients_obey() -> None:
    assert retry_headers(1e9) == {"retry-after": "60", "retry-after-ms": "60000"}
    assert retry_headers(0)["retry-after"] == "1"
    assert isinstance(invalid("n", "no"), ApiError)
