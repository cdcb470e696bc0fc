"""Structured output: the text follows the schema, the regex, the choice or the grammar."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import openai
import pytest

from tests.api.running import Running

MESSAGES: Any = [{"role": "user", "content": "Describe Paris."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Lyon"]},
        "big": {"type": "boolean"},
        "digit": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "big", "digit"],
    "additionalProperties": False,
}


def chat(api: Running, **options: Any) -> str:
    options = {"model": "sql", "messages": MESSAGES, "max_tokens": 800, "seed": 3, **options}
    answer = api.client().chat.completions.create(**options)
    assert answer.choices[0].finish_reason == "stop"
    return str(answer.choices[0].message.content)


def complete(api: Running, structured: dict[str, Any], **options: Any) -> str:
    answer = api.client().completions.create(
        model="base",
        prompt="Say",
        max_tokens=800,
        seed=3,
        extra_body={"structured_outputs": structured},
        **options,
    )
    return str(answer.choices[0].text)


def test_a_json_schema_is_followed_by_every_choice(api: Running) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    answer = api.client().chat.completions.create(
        model="sql", messages=MESSAGES, response_format=form, max_tokens=800, n=4, seed=1
    )
    found = [json.loads(choice.message.content or "") for choice in answer.choices]
    for city in found:
        assert set(city) == {"city", "big", "digit"}
        assert city["city"] in ("Paris", "Lyon")
        assert city["digit"] in range(10)
    assert len({json.dumps(city) for city in found}) > 1


def test_the_same_schema_by_the_other_field(api: Running) -> None:
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        assert set(json.loads(complete(api, {"json": schema}))) == {"city", "big", "digit"}


def test_a_choice_a_regex_and_a_grammar_are_followed(api: Running) -> None:
    assert complete(api, {"choice": ["yes", "no", "maybe ☃"]}) in ("yes", "no", "maybe ☃")
    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", complete(api, {"regex": "[0-9]{3}-[a-f]{2}"}))
    grammar = 'start: "<" ("a" | "b") ">"'
    assert complete(api, {"grammar": grammar}) in ("<a>", "<b>")


def test_a_stream_is_constrained_too(api: Running) -> None:
    stream = api.client().chat.completions.create(
        model="base",
        messages=MESSAGES,
        stream=True,
        max_tokens=50,
        extra_body={"structured_outputs": {"choice": ["Paris", "Lyon"]}},
    )
    text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert text in ("Paris", "Lyon")


def test_json_object_is_an_object(api: Running) -> None:
    # A random model would never close it by itself.
    bias = {str(i): 0 for i in range(1)}
    answer = api.client().chat.completions.create(
        model="base",
        messages=MESSAGES,
        response_format={"type": "json_object"},
        max_tokens=300,
        logit_bias=bias,
        temperature=0,
    )
    text = answer.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "body",
    [
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"regex": ""}},
        {"structured_outputs": {"grammar": "start: ("}},
        {"structured_outputs": {"json": "{"}},
        {"structured_outputs": {"json": "[]"}},
        {"structured_outputs": {"json": {"type": "nonsense"}}},
        {"structured_outputs": {"json": {"$ref": "http://127.0.0.1:1/schema.json"}}},
        {"structured_outputs": {"json": {"$ref": "file:///etc/passwd"}}},
        {"structured_outputs": {"unknown": 1}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 1}}},
        {"response_format": {"type": "text", "json_schema": {"name": "x"}}},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
    ],
)
def test_what_cannot_be_followed_is_refused(api: Running, body: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.client().chat.completions.create(
            model="base", messages=MESSAGES, max_tokens=5, extra_body=body
        )
    assert (refused.value.param or "").split(".")[0] in ("structured_outputs", "response_format")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


BOMBS: dict[str, dict[str, Any]] = {
    "repetition": {"regex": "((a{0,1000}){0,1000}){0,1000}b"},
    "alternatives": {"regex": "(a|a|a|a|a|a|a|a){0,200}" * 20 + "b"},
    "lookahead": {"regex": "(.*)*" * 50 + "x"},
    "long": {"regex": "a" * 200_000},
    "deep schema": {"json": nested(90)},
    "wide schema": {
        "json": {"type": "object", "properties": {f"p{i}": nested(3) for i in range(2000)}}
    },
    "many choices": {"choice": [f"c{i}" * 20 for i in range(20_000)]},
    "length": {"json": {"type": "string", "minLength": 10**8}},
    "items": {"json": {"type": "array", "minItems": 10**7, "items": {"type": "null"}}},
    "ambiguous grammar": {"grammar": "start: a\na: a a | b\nb: " + " | ".join(['"x"'] * 500)},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_bounded_and_the_others_are_served(api: Running, name: str) -> None:
    """Refused, or served within the limit; never a hang and never a 500."""
    start = time.monotonic()
    with api.http() as http:
        reply = http.post(
            "/v1/completions",
            json={
                "model": "base",
                "prompt": "x",
                "max_tokens": 3,
                "structured_outputs": BOMBS[name],
            },
        )
        took = time.monotonic() - start
        assert reply.status_code in (200, 400), reply.text
        assert took < 10
        start = time.monotonic()
        answer = http.post("/v1/completions", json={"model": "base", "prompt": "x"})
        assert answer.status_code == 200
        assert time.monotonic() - start < 3
