"""Requests over a limit or out of range: a quick 400 that names the field."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.api.running import Running

#: What the promise says; a machine that is busy with other things gets some more.
QUICK = 0.05
PATIENCE = 5


def post(
    api: Running, body: Any, path: str = "/v1/completions"
) -> tuple[int, dict[str, Any], float]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with api.http() as http:
        http.get("/version")  # the connection is there
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            reply = http.post(path, content=content, headers={"content-type": "application/json"})
            best = min(best, time.perf_counter() - start)
    return reply.status_code, reply.json()["error"], best


HUGE = 2**63
OVER: dict[str, tuple[dict[str, Any], str]] = {
    "n": ({"n": 10**9}, "n"),
    "n of 17": ({"n": 17}, "n"),
    "n of 0": ({"n": 0}, "n"),
    "prompts": ({"prompt": ["x"] * 129}, "prompt"),
    "very many prompts": ({"prompt": ["x"] * 100_000}, "prompt"),
    "no prompt at all": ({"prompt": []}, "prompt"),
    "an empty prompt": ({"prompt": ""}, "prompt"),
    "no tokens": ({"prompt": [[]]}, "prompt"),
    "mixed prompt": ({"prompt": ["x", 1]}, "prompt"),
    "prompt of a number": ({"prompt": 1}, "prompt"),
    "stop": ({"stop": ["x"] * 100_000}, "stop"),
    "five stops": ({"stop": list("abcde")}, "stop"),
    "an empty stop": ({"stop": [""]}, "stop"),
    "a long stop": ({"stop": "x" * 1025}, "stop"),
    "logprobs": ({"logprobs": 21}, "logprobs"),
    "logit_bias": ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    "bias of a token out of range": ({"logit_bias": {"320": 1}}, "logit_bias"),
    "bias of no token": ({"logit_bias": {"x": 1}}, "logit_bias"),
    "bias of a negative token": ({"logit_bias": {"-1": 1}}, "logit_bias"),
    "bias out of range": ({"logit_bias": {"1": 101}}, "logit_bias"),
    "max_tokens": ({"max_tokens": HUGE}, "max_tokens"),
    "negative max_tokens": ({"max_tokens": -1}, "max_tokens"),
    "context": ({"max_tokens": 1024}, "max_tokens"),
    "min_tokens": ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    "temperature": ({"temperature": 2.1}, "temperature"),
    "a text for a number": ({"temperature": "1"}, "temperature"),
    "true for a number": ({"n": True}, "n"),
    "a fraction for a count": ({"max_tokens": 1.5}, "max_tokens"),
    "top_p": ({"top_p": 0}, "top_p"),
    "top_k": ({"top_k": -2}, "top_k"),
    "min_p": ({"min_p": 1.5}, "min_p"),
    "repetition_penalty": ({"repetition_penalty": 0}, "repetition_penalty"),
    "presence_penalty": ({"presence_penalty": 2.5}, "presence_penalty"),
    "seed": ({"seed": HUGE}, "seed"),
    "a token of the prompt": ({"prompt": [320]}, "prompt"),
    "a negative token": ({"prompt": [-1]}, "prompt"),
    "a huge token": ({"prompt": [HUGE]}, "prompt"),
    "a huge token in a list": ({"prompt": [[1], [10**30]]}, "prompt"),
    "stop_token_ids": ({"stop_token_ids": [320]}, "stop_token_ids"),
    "many stop_token_ids": ({"stop_token_ids": [1] * 100_000}, "stop_token_ids"),
    "allowed_token_ids": ({"allowed_token_ids": [HUGE]}, "allowed_token_ids"),
    "no token allowed": ({"allowed_token_ids": []}, "allowed_token_ids"),
    "a long prompt": ({"prompt": "the base model " * 2000}, "prompt"),
    "a hopeless prompt": ({"prompt": "x" * 4_000_000}, "prompt"),
    "priority": ({"priority": -1}, "priority"),
    "suffix": ({"suffix": "x"}, "suffix"),
    "best_of": ({"best_of": 2}, "best_of"),
    "store": ({"store": True}, "store"),
    "service_tier": ({"service_tier": "flex"}, "service_tier"),
    "an unknown field": ({"temprature": 0}, "temprature"),
    "a model of nothing": ({"model": ""}, "model"),
}


@pytest.mark.parametrize("name", OVER)
def test_over_a_limit_is_a_quick_400(api: Running, name: str) -> None:
    change, param = OVER[name]
    status, error, seconds = post(api, {"model": "base", "prompt": "x", **change})
    assert status == 400, error
    # a prompt that is too long is too long for max_tokens, too
    assert error["param"].split(".")[0] in (param, "max_tokens" if "prompt" in name else param)
    assert seconds < QUICK * PATIENCE


def test_context_that_is_not_there_is_said_in_openai_s_words(api: Running) -> None:
    for change in ({"max_tokens": 1024}, {"prompt": "x" * 4_000_000}):
        _, error, _ = post(api, {"model": "base", "prompt": "x", **change})
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"{} {}",
        b"\xff\xfe",
        b'{"model":"base","prompt":"x","temperature":NaN}',
        b'{"model":"base","prompt":"x","temperature":Infinity}',
        b'{"model":"base","prompt":"x","temperature":1e999}',
        b'{"model":"base","prompt":"\\ud800"}',
        b'{"model":"base","prompt":"\xed\xa0\x80"}',
        b'{"model":"base","prompt":"x","metadata":' + b"[" * 100_000,
        b'{"model":"base","prompt":"x","seed":' + b"9" * 10_000 + b"}",
        b'{"model":"base","prompt":"x",' + b'"a":1,' * 100_000 + b'"b":1}',
    ],
)
def test_json_that_is_none_is_a_quick_400(api: Running, body: bytes) -> None:
    status, error, seconds = post(api, body)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert seconds < QUICK * PATIENCE


def test_a_body_must_be_said_to_be_json(api: Running) -> None:
    with api.http() as http:
        for headers in ({}, {"content-type": "text/plain"}):
            reply = http.post(
                "/v1/completions", content=b'{"model":"base","prompt":"x"}', headers=headers
            )
            assert reply.status_code == 400
            assert "application/json" in reply.json()["error"]["message"]


IDS = [
    "../../etc/passwd",
    "..%2f..%2fetc",
    "%2e%2e",
    "sql%00",
    "sql\x00",
    "%252e",
    "n" * 4096,
    "\u202esql",
    "🦋",
    "sql;drop table",
    "' or 1=1 --",
    "sql:99999999999999999999",
    "sql@sha256:zz",
    "{{7*7}}",
    "sql/content/content",
    "a//b",
    " ",
]


@pytest.mark.parametrize("given", IDS)
def test_any_id_is_answered_with_400_or_404(api: Running, given: str) -> None:
    with api.http() as http:
        bodies = [http.post("/v1/completions", json={"model": given, "prompt": "x"})]
        for method in ("GET", "DELETE"):
            bodies += [
                http.request(method, path + form.replace("\x00", "%00"))
                for path in ("/v1/models/", "/v1/adapters/")
                for form in (given, _quoted(given))
            ]
    for reply in bodies:
        assert reply.status_code in (400, 404, 405), (given, reply.text)
        assert reply.headers["content-type"] == "application/json"
        assert len(reply.text) < 2000
        assert "root:" not in reply.text


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-1.2:3_x", True),
        ("", False),
        ("x" * 129, False),
        ("a b", False),
        ("{}", False),
        ("é", False),
    ],
)
def test_a_request_id_is_kept_when_it_is_sane(api: Running, given: str, kept: bool) -> None:
    with api.http() as http:
        reply = http.get("/version", headers=[(b"x-request-id", given.encode())])
    assert (reply.headers["x-request-id"] == given) is kept
    assert reply.headers["x-request-id"].isascii()
