"""Every error class of the openai client, and what it does by itself about them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.running import Running, running
from tests.api.sockets import connected, post


def test_bad_request(api: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.client().completions.create(model="base", prompt="x", temperature=3)
    error = caught.value
    assert (error.status_code, error.param, error.type) == (
        400,
        "temperature",
        "invalid_request_error",
    )
    assert error.request_id == error.response.headers["x-request-id"]


def test_authentication(api: Running) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        api.client("sk-nobody").models.list()
    assert caught.value.code == "invalid_api_key"


def test_permission(api: Running) -> None:
    client = api.client(api.new_key(), base_url=api.url)
    with pytest.raises(openai.PermissionDeniedError):
        client.get("/metrics", cast_to=object, options={"headers": {"x-forwarded-for": "1.2.3.4"}})


def test_not_found(api: Running) -> None:
    for call in (
        lambda: api.client().completions.create(model="gpt-4o", prompt="x"),
        lambda: api.client().models.retrieve("gpt-4o"),
        lambda: api.client().embeddings.create(model="base", input="x"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()


def test_unprocessable(api: Running) -> None:
    with pytest.raises(openai.UnprocessableEntityError):
        api.client().post(
            "/adapters?name=x",
            content=b"not an adapter",
            cast_to=object,
            options={"headers": {"content-type": "application/octet-stream"}},
        )


def test_a_stream_that_cannot_begin_is_an_error_and_no_stream(api: Running) -> None:
    with pytest.raises(openai.NotFoundError):
        api.client().completions.create(model="nobody", prompt="x", stream=True)


@pytest.fixture(scope="module")
def narrow(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that runs one sequence at a time and lets few wait."""
    limits = {
        "queued": 3,
        "queued_per_tenant": 2,
        "queue_seconds": 1.5,
        "request_seconds": 8.0,
        "first_token_seconds": 4.0,
    }
    with running(api_base, tmp_path_factory.mktemp("narrow"), limits, max_rows=1) as server:
        yield server.unhurried()


LONG: dict[str, Any] = {
    "model": "base",
    "prompt": "x",
    "max_tokens": 1000,
    "stream": True,
    "ignore_eos": True,
}


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_tenant_s_queue_and_the_server_s_queue_are_bounded(narrow: Running) -> None:
    engine, admission = narrow.services.engine, narrow.services.admission
    other, third = narrow.new_key("other"), narrow.new_key("third")
    key = narrow.new_key("flood")
    with connected(narrow.url) as first, connected(narrow.url) as second:
        first.sendall(post("/v1/completions", key, LONG))
        wait_for(lambda: engine.stats().running and not admission.waiting)
        for connection, whose in ((second, key),):
            connection.sendall(post("/v1/completions", whose, {**LONG, "n": 2}))
        wait_for(lambda: admission.waiting == 2)
        start = time.monotonic()
        with pytest.raises(openai.RateLimitError) as limited:
            narrow.client(key).completions.create(model="base", prompt="x")
        assert time.monotonic() - start < 0.5
        assert limited.value.code == "rate_limit_exceeded"
        assert float(limited.value.response.headers["retry-after-ms"]) > 0
        with connected(narrow.url) as fourth:
            fourth.sendall(post("/v1/completions", other, LONG))
            wait_for(lambda: admission.waiting == 3)
            start = time.monotonic()
            with pytest.raises(openai.InternalServerError) as full:
                narrow.client(third).completions.create(model="base", prompt="x")
            assert time.monotonic() - start < 0.5
        assert (full.value.status_code, full.value.code) == (503, "overloaded")
        assert int(full.value.response.headers["retry-after"]) >= 1
    wait_for(lambda: not admission.inside)


def test_a_request_does_not_wait_in_the_queue_for_ever(narrow: Running) -> None:
    engine = narrow.services.engine
    with connected(narrow.url) as first:
        first.sendall(post("/v1/completions", narrow.key, LONG))
        wait_for(lambda: engine.stats().running)
        # ignore_eos: it would run for longer than the second one may wait
        start = time.monotonic()
        with pytest.raises(openai.InternalServerError) as late:
            narrow.client().completions.create(model="base", prompt="x", max_tokens=1)
        waited = time.monotonic() - start
    assert late.value.status_code == 503
    assert "retry-after" in late.value.response.headers
    assert 1.0 < waited < 4.5
    wait_for(lambda: not narrow.services.admission.inside)


def test_the_client_waits_as_told_and_then_succeeds(narrow: Running) -> None:
    engine, admission = narrow.services.engine, narrow.services.admission
    key = narrow.new_key("patient")
    with connected(narrow.url) as first, connected(narrow.url) as second:
        first.sendall(post("/v1/completions", key, LONG))
        wait_for(lambda: engine.stats().running and not admission.waiting)
        second.sendall(post("/v1/completions", key, {**LONG, "n": 2}))
        wait_for(lambda: admission.waiting == 2)
        client = narrow.client(key, max_retries=2)
        requests: list[Any] = []

        def on_reply(reply: Any) -> None:
            requests.append(reply.status_code)
            first.close()
            second.close()

        client._client.event_hooks["response"].append(on_reply)
        start = time.monotonic()
        answer = client.completions.create(model="base", prompt="x", max_tokens=1)
        assert time.monotonic() - start > 0.25  # the shortest wait that is ever advised
    assert requests[0] == 429
    assert requests[-1] == 200
    assert answer.choices
    wait_for(lambda: not admission.inside)


def test_a_request_that_takes_too_long_is_ended(narrow: Running) -> None:
    """In the midst of a stream by an error event, which the client raises."""
    object.__setattr__(narrow.services.settings.limits, "request_seconds", 0.5)
    try:
        stream = narrow.client().completions.create(
            model="base",
            prompt="x",
            max_tokens=1000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with pytest.raises(openai.APIError, match=r"longer than 0\.5 s") as ended:
            list(stream)
        assert ended.value.code == "request_timeout"
        with pytest.raises(openai.InternalServerError) as plain:
            narrow.client().completions.create(
                model="base", prompt="x", max_tokens=1000, extra_body={"ignore_eos": True}
            )
        assert plain.value.response.headers["x-should-retry"] == "false"
    finally:
        object.__setattr__(narrow.services.settings.limits, "request_seconds", 8.0)
    wait_for(lambda: not narrow.services.engine.stats().running)


def test_nobody_there(api: Running) -> None:
    with pytest.raises(openai.APIConnectionError):
        openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0).models.list()
