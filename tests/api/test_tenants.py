"""Keys and tenants: who is let in, and that another tenant's things are not there."""

from __future__ import annotations

import io
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest

from gossamer.api.logs import JsonFormatter
from tests.api.running import Running

#: method, path, JSON
REQUESTS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/sql", None),
    ("DELETE", "/v1/models/sql", None),
    ("POST", "/v1/completions", {"model": "base", "prompt": "a"}),
    ("POST", "/v1/chat/completions", {"model": "base", "messages": []}),
    ("GET", "/v1/adapters", None),
    ("POST", "/v1/adapters", None),
    ("GET", "/v1/adapters/sql", None),
    ("GET", "/v1/adapters/sql/content", None),
    ("POST", "/v1/adapters/sql/rollback", None),
    ("DELETE", "/v1/adapters/sql", None),
    ("GET", "/v1/files", None),
    ("POST", "/v1/files", None),
    ("GET", "/v1/files/file-1", None),
    ("GET", "/v1/files/file-1/content", None),
    ("DELETE", "/v1/files/file-1", None),
    ("GET", "/v1/fine_tuning/methods", None),
    ("GET", "/v1/fine_tuning/jobs", None),
    ("POST", "/v1/fine_tuning/jobs", {"model": "base", "training_file": "file-1"}),
    ("GET", "/v1/fine_tuning/jobs/ftjob-1", None),
    ("POST", "/v1/fine_tuning/jobs/ftjob-1/cancel", None),
    ("POST", "/v1/fine_tuning/jobs/ftjob-1/pause", None),
    ("POST", "/v1/fine_tuning/jobs/ftjob-1/resume", None),
    ("GET", "/v1/fine_tuning/jobs/ftjob-1/events", None),
    ("GET", "/v1/fine_tuning/jobs/ftjob-1/checkpoints", None),
    ("POST", "/tokenize", {"prompt": "a"}),
    ("POST", "/detokenize", {"tokens": [1]}),
    ("GET", "/version", None),
    ("GET", "/openapi.json", None),
    ("GET", "/docs", None),
    ("GET", "/no/such/route", None),
    ("OPTIONS", "/v1/models", None),
]


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
def test_every_route_but_health_wants_a_key(
    api: Running, method: str, path: str, body: Any
) -> None:
    with api.http("") as http:
        reply = http.request(method, path, json=body)
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert reply.headers["x-request-id"]


def bad_keys(api: Running) -> dict[str, str]:
    """Keys that are no good, each in its own way."""
    good = api.new_key("victim")
    revoked = api.services.store.keys.create("victim")
    api.services.store.keys.revoke(revoked.info.key_id)
    expired = api.services.store.keys.create(
        "victim", expires_at=datetime.now(UTC) - timedelta(seconds=1)
    )
    return {
        "wrong secret": good[:-1] + ("0" if good[-1] != "0" else "1"),
        "unknown id": "sk-" + "0" * 12 + good[15:],
        "expired": expired.text,
        "revoked": revoked.text,
        "malformed": "sk-x",
        "somebody else's kind": "sk-proj-" + "A" * 60,
    }


def test_every_bad_key_gets_the_same_answer(api: Running) -> None:
    answers = set()
    for key in bad_keys(api).values():
        with api.http(key) as http:
            reply = http.get("/v1/models", headers={"x-request-id": "same"})
        headers = {k: v for k, v in reply.headers.items() if k != "date"}
        answers.add((reply.status_code, reply.text, tuple(sorted(headers.items()))))
        with pytest.raises(openai.AuthenticationError):
            api.client(key).models.list()
    assert len(answers) == 1
    assert answers.pop()[0] == 401


def test_every_bad_key_takes_the_same_time(api: Running) -> None:
    keys = {name: key for name, key in bad_keys(api).items() if "kind" not in name}
    seconds: dict[str, list[float]] = {name: [] for name in keys}
    clients = {name: api.http(key) for name, key in keys.items()}
    for _ in range(60):  # in turn, so that a slow moment of the machine meets all of them
        for name, client in clients.items():
            start = time.perf_counter()
            client.get("/version")
            seconds[name].append(time.perf_counter() - start)
    for client in clients.values():
        client.close()
    medians = [statistics.median(values) for values in seconds.values()]
    assert max(medians) < 1.5 * min(medians) + 0.001, seconds


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Bearer {key}"), ("authorization", "Bearer {key}")],
        [("authorization", "{key}")],
        [("authorization", "Basic {key}")],
        [("x-api-key", "{key}")],
        [("authorization", "Bearer {key} x")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer " + "x" * 10_000)],
    ],
)
def test_a_key_is_taken_from_one_bearer_header_only(
    api: Running, headers: list[tuple[str, str]]
) -> None:
    given = [(name, value.format(key=api.key)) for name, value in headers]
    assert httpx.get(f"{api.url}/v1/models", headers=given).status_code == 401


@contextmanager
def server_log() -> Iterator[io.StringIO]:
    """All that the server's own loggers write at the most talkative level."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    # the clients of these tests run in the same process and log as well
    handler.addFilter(lambda record: record.name.split(".")[0] in ("gossamer", "uvicorn"))
    root, level = logging.getLogger(), logging.root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def test_keys_are_in_no_log_and_no_metric_and_no_table(api: Running) -> None:
    key = api.new_key("quiet")
    bad = key[:-4] + "0000"
    with server_log() as log:
        for text in (key, bad):
            with api.http(text) as http:
                http.get("/v1/models")
                http.get("/v1/models/" + text)
                http.get("/v1/adapters?name=" + text)
                http.post("/v1/completions", json={"model": text, "prompt": text, text: text})
                http.post("/v1/completions", content=text, headers={"x-request-id": text})
        with api.http() as http:
            metrics = http.get("/metrics").text
        lines = log.getvalue().splitlines()
    assert len([line for line in lines if json.loads(line)["logger"] == "gossamer.access"]) == 11
    secrets = (key.split("-")[2], bad.split("-")[2])
    for text in (*lines, metrics):
        assert not any(secret in text for secret in secrets)
    for path in Path(api.services.settings.data_dir).rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(secret.encode() in data for secret in secrets), path


def test_a_client_cannot_write_lines_of_its_own_into_the_log(api: Running) -> None:
    evil = '\n{"level":"error","logger":"gossamer.access","message":"forged"}\r\n'
    with server_log() as log:
        with api.http() as http:
            http.post("/v1/completions", json={"model": evil, "prompt": evil, "user": evil})
            http.get("/" + quote(evil), headers={"user-agent": "x"})
            http.post("/v1/adapters", data={"name": evil}, files={"file": b"x"})
        lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert len(lines) >= 3
    assert not [line for line in lines if line["message"] == "forged"]


def test_an_error_about_a_field_does_not_repeat_its_value(api: Running) -> None:
    with api.http() as http:
        for body in (
            {"model": "base", "prompt": "x", "temperature": "hunter2-hunter2"},
            {"model": "base", "prompt": {"hunter2-hunter2": 1}},
            {"model": "base", "prompt": "x", "metadata": "hunter2-hunter2"},
        ):
            reply = http.post("/v1/completions", json=body)
            assert reply.status_code == 400
            assert "hunter2" not in reply.text


Attempt = Callable[[httpx.Client, str], httpx.Response]
COMPLETION = {"prompt": "x", "max_tokens": 1}
ATTEMPTS: dict[str, Attempt] = {
    "complete": lambda http, name: http.post("/v1/completions", json={"model": name, **COMPLETION}),
    "complete in a mix": lambda http, name: http.post(
        "/v1/completions", json={"model": f"own+{name}", **COMPLETION}
    ),
    "complete by the body": lambda http, name: http.post(
        "/v1/completions",
        json={"model": "base", "merged_adapters": {"ids": ["own", name]}, **COMPLETION},
    ),
    "chat": lambda http, name: http.post(
        "/v1/chat/completions",
        json={"model": name, "messages": [{"role": "user", "content": "x"}]},
    ),
    "stream": lambda http, name: http.post(
        "/v1/completions", json={"model": name, "stream": True, **COMPLETION}
    ),
    "tokenize": lambda http, name: http.post("/tokenize", json={"model": name, "prompt": "x"}),
    "model": lambda http, name: http.get(f"/v1/models/{name}"),
    "delete the model": lambda http, name: http.delete(f"/v1/models/{name}"),
    "show": lambda http, name: http.get(f"/v1/adapters/{name}"),
    "download": lambda http, name: http.get(f"/v1/adapters/{name}/content"),
    "roll back": lambda http, name: http.post(f"/v1/adapters/{name}/rollback"),
    "delete": lambda http, name: http.delete(f"/v1/adapters/{name}"),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_another_tenant_s_adapter_is_like_a_missing_one(api: Running, attempt: str) -> None:
    owner, spy = api.new_key("owner"), api.new_key("spy")
    digest = api.upload("private", 31, owner)["digest"]
    api.upload("own", 32, spy)
    with api.http(spy) as http:
        answers = set()
        for given in (
            "private",
            "private:1",
            f"private@{digest}",
            "owner/private",
            "owner/private:1",
            "missing",
            "missing:1",
            f"missing@{digest}",
            "nobody/missing",
            "own:7",
        ):
            reply = ATTEMPTS[attempt](http, given)
            assert reply.status_code == 404, (given, reply.text)
            answers.add(reply.text.replace(given, "…"))
        assert len(answers) == 1, answers
    assert api.client(owner).models.retrieve("private").id == "private"


def test_a_deleted_adapter_is_like_a_missing_one(api: Running) -> None:
    key = api.new_key("deleter")
    api.upload("gone", 33, key)
    client = api.client(key)
    client.models.delete("gone")
    with pytest.raises(openai.NotFoundError) as gone:
        client.completions.create(model="gone", prompt="x")
    with pytest.raises(openai.NotFoundError) as never:
        client.completions.create(model="never", prompt="x")
    assert gone.value.response.text.replace("gone", "never") == never.value.response.text


def test_tenants_see_their_own_adapters_only(api: Running) -> None:
    a, b = api.new_key("seer-a"), api.new_key("seer-b")
    api.upload("same-name", 34, a)
    api.upload("same-name", 35, b)
    api.upload("only-b", 36, b)
    assert [m.id for m in api.client(a).models.list()] == ["base", "same-name"]
    with api.http(a) as first, api.http(b) as second:
        mine, theirs = (
            http.get("/v1/adapters/same-name").json()["versions"][0]["digest"]
            for http in (first, second)
        )
    assert mine != theirs


def test_a_prompt_of_one_tenant_is_not_in_another_s_cache(api: Running) -> None:
    prompt = "She sells sea shells on the sea shore, and the shells are sea shells. " * 2

    def cached(key: str) -> int:
        answer = api.client(key).completions.create(model="base", prompt=prompt, max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    a, b = api.new_key("cache-a"), api.new_key("cache-b")
    assert [cached(a), cached(a) > 0, cached(b)] == [0, True, 0]
