"""Health, version, tokens, and the ends of a server: drained, killed, or with a dead engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.running import Running, running
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]


def test_health_is_open_and_the_version_is_told(api: Running) -> None:
    with api.http("") as http:
        for path in ("/health/live", "/health/ready"):
            reply = http.get(path)
            assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
    with api.http() as http:
        version = http.get("/version").json()
    assert version["base_fingerprint"] == api.services.base.fingerprint
    assert version["version"]


def test_tokens_there_and_back(api: Running) -> None:
    tokenizer = tiny_tokenizer()
    text = "The base model stays ☃"
    with api.http() as http:
        there = http.post(
            "/tokenize", json={"model": "sql", "prompt": text, "return_token_strs": True}
        ).json()
        back = http.post("/detokenize", json={"tokens": there["tokens"]}).json()
        messages = [{"role": "user", "content": "hi"}]
        chat = http.post("/tokenize", json={"messages": messages}).json()
    assert there["tokens"] == tokenizer.encode(text)
    assert there["count"] == len(there["tokens"]) == len(there["token_strs"])
    assert there["max_model_len"] == 1024
    assert back == {"prompt": text}
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat["tokens"] == tokenizer.encode(str(rendered))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "x" * 5_000_000}),
        ("/detokenize", {"tokens": [320]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [1] * 2000}),
        ("/detokenize", {"tokens": [10**30]}),
    ],
)
def test_what_has_no_tokens_is_refused(api: Running, path: str, body: Any) -> None:
    with api.http() as http:
        assert http.post(path, json=body).status_code == 400


@pytest.fixture
def mortal(api_base: Path, tmp_path: Path) -> Iterator[Running]:
    """A server to be ended by the test."""
    with running(api_base, tmp_path / "data", drain_seconds=1.5) as server:
        yield server.unhurried()


def test_a_dead_engine_is_not_ready_and_answers_what_was_under_way(mortal: Running) -> None:
    answers: list[Any] = []

    def ask(stream: bool) -> None:
        try:
            options: Any = {"model": "base", "prompt": "x", "max_tokens": 1000, "stream": stream}
            reply = mortal.client().completions.create(**options, extra_body={"ignore_eos": True})
            answers.append(list(reply) if stream else reply)
        except openai.APIError as error:
            answers.append(error)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
    engine = mortal.services.engine
    deadline = time.monotonic() + 20
    while engine.stats().running < 2 and time.monotonic() < deadline:
        time.sleep(0.005)

    def die() -> None:
        raise SystemExit("the thread dies")

    engine._loop.post(die)
    start = time.monotonic()
    with mortal.http("") as http:
        while http.get("/health/ready").status_code == 200:
            assert time.monotonic() - start < 1.0
        assert "died" in http.get("/health/ready").json()["status"]
        assert http.get("/health/live").status_code == 200
    for thread in threads:
        thread.join(5)
    assert len(answers) == 2
    assert all(isinstance(answer, openai.APIError) for answer in answers)
    with pytest.raises(openai.InternalServerError) as refused:
        mortal.client().completions.create(model="base", prompt="x")
    assert refused.value.status_code == 503


def test_a_drain_lets_requests_finish_and_ends_the_rest_with_an_error(mortal: Running) -> None:
    client = mortal.client()
    options: Any = {"model": "base", "prompt": "x", "stream": True}
    short = iter(client.completions.create(**options, max_tokens=60))
    long = iter(
        client.completions.create(**options, max_tokens=1000, extra_body={"ignore_eos": True})
    )
    next(short), next(long)
    start = time.monotonic()
    mortal.server.drain()
    with mortal.http() as http:
        while http.get("/health/ready").status_code == 200:
            assert time.monotonic() - start < 1.0
        refused = http.get("/v1/models")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) >= 1
        assert http.get("/health/live").status_code == 200
    assert any(c.choices and c.choices[0].finish_reason for c in short)
    with pytest.raises(openai.APIError, match=r"stopp|shut"):
        list(long)
    assert 1.0 < time.monotonic() - start < 5
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{mortal.url}/health/live")
        except httpx.TransportError:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("it still listens")


def test_a_second_signal_ends_the_drain(api_base: Path, tmp_path: Path) -> None:
    with running(api_base, tmp_path, drain_seconds=60.0) as server:
        stream = iter(
            server.unhurried()
            .client()
            .completions.create(
                model="base",
                prompt="x",
                stream=True,
                max_tokens=1000,
                extra_body={"ignore_eos": True},
            )
        )
        next(stream)
        start = time.monotonic()
        server.server.drain()
        time.sleep(0.2)
        server.server.drain()
        with pytest.raises(openai.APIError):
            list(stream)
        assert time.monotonic() - start < 10


CHILD = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    from gossamer.api.serve import serve
    from gossamer.api.settings import Settings

    def on_ready(listening):
        key = listening.first_key
        print(json.dumps([listening.url, key.text if key else None]), flush=True)

    settings = Settings(memory_bytes=64 << 20, port=0)
    code = serve(settings, on_ready=on_ready)
    print("ended", flush=True)
    sys.exit(code)
    """
)


def start_child(base: Path, data: Path) -> tuple[subprocess.Popen[str], str, str | None]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "GOSSAMER_BASE": str(base),
            "GOSSAMER_DATA_DIR": str(data),
            "GOSSAMER_LIMITS__QUEUED": "7",
        },
    )
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(child.communicate()[1])
    url, key = json.loads(line)
    return child, url, key


def test_sigterm_ends_a_process_in_order_and_the_first_key_is_made_once(
    api_base: Path, tmp_path: Path
) -> None:
    child, url, key = start_child(api_base, tmp_path)
    assert key is not None
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        stream = iter(
            client.completions.create(model="base", prompt="x", max_tokens=40, stream=True)
        )
        next(stream)
        child.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (0, "ended\n")
    for line in err.splitlines():
        json.loads(line)  # nothing but JSON lines
    assert "SIGTERM" in err
    assert key not in err
    with running(api_base, tmp_path) as again:  # the next start on the same data
        assert again.key == ""
        assert again.client(key).models.list().data
