"""`/generate` as LoRAX's clients know it, against a real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gossamer.api.schemas.compatibility import GenerateEvent, GenerateParameters
from tests.api.running import Running, running
from tests.api.test_compatibility import PROMPT, complete, generate, refusal, unique

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Lyon"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture
def http(api: Running) -> Iterator[httpx.Client]:
    with api.http() as client:
        yield client


def made(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    content: dict[str, Any] = reply.json()
    return content


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = reply.text.split("\n\n")
    assert found.pop() == ""
    contents = [json.loads(one.removeprefix("data:")) for one in found]
    for content in contents:
        assert GenerateEvent.model_validate(content).model_dump() == content
    return contents


def test_it_continues_a_text_greedily_as_a_completion_does(http: httpx.Client) -> None:
    for model, parameters in (("base", {}), ("sql", {"adapter_id": "sql"})):
        expected = complete(http, model, ignore_eos=False)
        reply = generate(http, **parameters)
        assert made(reply) == {"generated_text": expected.json()["choices"][0]["text"]}
        assert reply.headers["x-gossamer-mix"] == expected.headers["x-gossamer-mix"]


def test_the_details_tell_every_token(http: httpx.Client) -> None:
    expected = complete(http, "sql", logprobs=0).json()
    choice = expected["choices"][0]
    content = made(generate(http, adapter_id="sql", details=True, ignore_eos_token=True))
    details = content["details"]
    tokens = details.pop("tokens")
    assert details == {
        "finish_reason": "length",
        "prompt_tokens": expected["usage"]["prompt_tokens"],
        "generated_tokens": 20,
        "seed": None,
        "prefill": [],
    }
    assert [token["id"] for token in tokens] == choice["token_ids"]
    assert [token["logprob"] for token in tokens] == pytest.approx(
        choice["logprobs"]["token_logprobs"], abs=1e-4
    )
    plain = [token["text"] for token in tokens if not token["special"]]
    assert "".join(plain) == content["generated_text"] == choice["text"]


def test_the_prompts_tokens_are_scored_when_asked_for(http: httpx.Client) -> None:
    echoed = complete(http, "sql", echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    prefill = made(generate(http, adapter_id="sql", decoder_input_details=True))["details"][
        "prefill"
    ]
    assert [token["id"] for token in prefill] == echoed["prompt_token_ids"]
    assert "".join(token["text"] for token in prefill) == PROMPT
    assert prefill[0]["logprob"] is None
    assert [token["logprob"] for token in prefill[1:]] == pytest.approx(
        echoed["logprobs"]["token_logprobs"][1:], abs=1e-4
    )


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"adapter_id": "math", "ignore_eos_token": True, "max_new_tokens": 1},
        {"adapter_id": "sql", "do_sample": True, "temperature": 1.5, "seed": 5},
        {"response_format": {"type": "json_object", "schema": SCHEMA}, "max_new_tokens": 200},
        {"return_full_text": True, "max_new_tokens": 7},
    ],
)
@pytest.mark.parametrize("route", ["/generate_stream", "/"])
def test_a_stream_adds_up_to_the_plain_reply(
    http: httpx.Client, route: str, parameters: dict[str, Any]
) -> None:
    plain = made(generate(http, **parameters, details=True))
    *others, last = events(generate(http, route, stream=True, **parameters, details=True))
    tokens = plain["details"].pop("tokens")
    assert [one["token"]["id"] for one in [*others, last]] == [token["id"] for token in tokens]
    assert "".join(one["token"]["text"] for one in [*others, last]) == "".join(
        token["text"] for token in tokens
    )
    assert all(one["generated_text"] is one["details"] is None for one in others)
    assert last["generated_text"] == plain["generated_text"]
    del plain["details"]["prefill"]
    assert last["details"] == plain["details"]


def test_a_stream_that_fails_ends_with_an_error(
    api_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    limits = {"request_seconds": 0.5}
    with running(api_base, tmp_path_factory.mktemp("slow"), limits) as slow:
        slow.unhurried()
        with slow.http() as http:
            reply = generate(http, "/generate_stream", max_new_tokens=900, ignore_eos_token=True)
    *others, last = reply.text.removesuffix("\n\n").split("\n\n")
    assert reply.status_code == 200
    assert all("token" in json.loads(one.removeprefix("data:")) for one in others)
    assert json.loads(last.removeprefix("data:"))["error"]["code"] == "request_timeout"


def test_a_stream_has_details_only_when_asked_for(http: httpx.Client) -> None:
    last = events(generate(http, "/generate_stream"))[-1]
    assert last["details"] is None
    assert last["generated_text"] == made(generate(http))["generated_text"]


def test_the_root_answers_with_a_list_of_one(http: httpx.Client) -> None:
    reply = generate(http, "/", adapter_id="sql", details=True)
    alone = generate(http, adapter_id="sql", details=True)
    assert reply.json() == [alone.json()]
    assert reply.headers["x-gossamer-mix"] == alone.headers["x-gossamer-mix"]


def test_a_merge_in_the_body_is_the_merge_of_the_model_string(http: httpx.Client) -> None:
    expected = complete(http, "sql*0.7+math*0.3")
    ids = expected.json()["choices"][0]["token_ids"]
    # the second is what LoRAX's own client sends
    for more in ({}, {"density": 1.0, "merge_strategy": None, "majority_sign_method": None}):
        merged = {"ids": ["sql", "math"], "weights": [0.7, 0.3], **more}
        reply = generate(http, merged_adapters=merged, details=True, ignore_eos_token=True)
        assert [token["id"] for token in made(reply)["details"]["tokens"]] == ids
        assert reply.headers["x-gossamer-mix"] == expected.headers["x-gossamer-mix"]
    other = {"ids": ["sql", "math"], "merge_strategy": "overlap_mean", "lambda": 2.0}
    body = {**other, "merge_strategy": "linear"}
    linear = generate(http, merged_adapters=body)
    assert (
        linear.headers["x-gossamer-mix"]
        == (complete(http, "sql*2+math*2").headers["x-gossamer-mix"])
    )
    assert refusal(generate(http, merged_adapters=other)) == (
        400,
        "parameters.merged_adapters.lambda",
    )


def test_a_stop_sequence_ends_the_text_behind_it(http: httpx.Client) -> None:
    whole = made(generate(http, ignore_eos_token=True))["generated_text"]
    stop = whole[4:6]
    content = made(generate(http, ignore_eos_token=True, stop=[stop, "never"], details=True))
    assert content["generated_text"] == whole[: whole.index(stop) + len(stop)]
    assert content["details"]["finish_reason"] == "stop_sequence"


def test_a_schema_is_followed(http: httpx.Client) -> None:
    sampled: dict[str, Any] = {"do_sample": True, "seed": 3, "max_new_tokens": 400, "details": True}
    form = {"type": "json_object", "schema": SCHEMA}
    content = made(generate(http, response_format=form, **sampled))
    assert json.loads(content["generated_text"])["city"] in ("Paris", "Lyon")
    assert content["details"]["finish_reason"] == "eos_token"
    text = made(generate(http, response_format={"type": "json_object"}, **sampled))
    assert text["generated_text"].lstrip().startswith("{")


@pytest.mark.parametrize(
    "drawn", [{"do_sample": True}, {"temperature": 1.0}, {"top_k": 50}, {"top_p": 0.99}]
)
def test_tokens_are_drawn_when_a_parameter_of_drawing_is_given(
    http: httpx.Client, drawn: dict[str, Any]
) -> None:
    def say(**parameters: Any) -> dict[str, Any]:
        return made(generate(http, **drawn, details=True, **parameters))

    first = say()
    seed = first["details"]["seed"]
    assert isinstance(seed, int)
    assert say(seed=seed) == first
    assert len({say(seed=number)["generated_text"] for number in range(4)}) > 1


@pytest.mark.parametrize(
    "greedy",
    [
        {},
        {"seed": 3},
        {"temperature": 0.0, "do_sample": True},
        {"top_k": 0, "top_p": 1.0, "typical_p": 1.0},
        {"best_of": 1, "watermark": False, "return_k_alternatives": 0, "api_token": "x"},
        {"adapter_source": "local", "repetition_penalty": 1.0, "stop": [], "do_sample": False},
        dict.fromkeys(GenerateParameters.model_fields),
    ],
)
def test_what_changes_nothing_is_accepted(http: httpx.Client, greedy: dict[str, Any]) -> None:
    assert made(generate(http, **greedy)) == made(generate(http))


def test_the_text_may_begin_with_the_prompt(http: httpx.Client) -> None:
    alone = made(generate(http))["generated_text"]
    assert made(generate(http, return_full_text=True))["generated_text"] == PROMPT + alone


def test_a_conversation_is_rendered_as_in_chat_completions(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Count to ten."}]
    chat = http.post(
        "/v1/chat/completions",
        json={"model": "sql", "messages": messages, "temperature": 0, "max_tokens": 20},
    ).json()
    content = made(
        generate(
            http,
            inputs=json.dumps(messages),
            apply_chat_template=True,
            adapter_id="sql",
            details=True,
        )
    )
    assert content["generated_text"] == chat["choices"][0]["message"]["content"]
    assert content["details"]["prompt_tokens"] == chat["usage"]["prompt_tokens"]
    for inputs in (PROMPT, "[]", '{"role": "user"}', '[{"role": "nobody", "content": ""}]'):
        assert refusal(generate(http, inputs=inputs, apply_chat_template=True)) == (400, "inputs")


@pytest.mark.parametrize(
    ("parameters", "status", "param"),
    [
        ({"watermark": True}, 400, "watermark"),
        ({"typical_p": 0.9}, 400, "typical_p"),
        ({"best_of": 2}, 400, "best_of"),
        ({"return_k_alternatives": 3}, 400, "return_k_alternatives"),
        ({"truncate": 10}, 400, "truncate"),
        ({"adapter_parameters": {"ids": ["sql"]}}, 400, "adapter_parameters"),
        ({"adapter_source": "hub"}, 400, "adapter_source"),
        ({"adapter_source": "s3"}, 400, "adapter_source"),
        ({"adapter_id": "nobody"}, 404, "adapter_id"),
        ({"adapter_id": "owner/Model-7B"}, 404, "adapter_id"),
        ({"adapter_id": "sql*17"}, 400, "adapter_id"),
        ({"adapter_id": "sql", "merged_adapters": {"ids": ["math"]}}, 400, "merged_adapters"),
        ({"merged_adapters": {"ids": ["nobody"]}}, 404, "merged_adapters.ids"),
        ({"merged_adapters": {"ids": []}}, 400, "merged_adapters.ids"),
        (
            {"merged_adapters": {"ids": ["sql"], "weights": [1.0, 2.0]}},
            400,
            "merged_adapters.weights",
        ),
        (
            {"merged_adapters": {"ids": ["sql"], "density": 0.5}},
            400,
            "merged_adapters.density",
        ),
        (
            {"merged_adapters": {"ids": ["sql", "math"], "merge_strategy": "dare_ties"}},
            400,
            "merged_adapters.merge_strategy",
        ),
        ({"temperature": -1.0}, 400, "temperature"),
        ({"top_k": -1}, 400, "top_k"),
        ({"top_p": 1.5}, 400, "top_p"),
        ({"repetition_penalty": 0.0}, 400, "repetition_penalty"),
        ({"seed": -1}, 400, "seed"),
        ({"max_new_tokens": 0}, 400, "max_new_tokens"),
        ({"max_new_tokens": 10**6}, 400, "max_new_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
        ({"response_format": {"type": "regex"}}, 400, "response_format.type"),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "nothing"}}},
            400,
            "response_format",
        ),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ],
)
@pytest.mark.parametrize("route", ["/generate", "/generate_stream", "/"])
def test_every_refusal_names_its_field(
    http: httpx.Client, route: str, parameters: dict[str, Any], status: int, param: str
) -> None:
    reply = generate(http, route, **parameters)
    assert refusal(reply) == (status, f"parameters.{param}"), reply.text


def test_refusals_outside_of_the_parameters_name_their_field(http: httpx.Client) -> None:
    assert refusal(http.post("/generate", json={})) == (400, "inputs")
    assert refusal(generate(http, inputs="")) == (400, "inputs")
    assert refusal(generate(http, inputs="x" * 10**6)) == (400, "inputs")
    assert refusal(generate(http, stream=True)) == (400, "stream")
    assert refusal(generate(http, "/generate_stream", stream=False)) == (400, "stream")
    streamed = generate(http, "/generate_stream", decoder_input_details=True)
    assert refusal(streamed) == (400, "parameters.decoder_input_details")
    unknown = http.post("/", json={"inputs": PROMPT, "model": "sql"})
    assert refusal(unknown) == (400, "model")
    assert unknown.json()["error"]["code"] == "unknown_field"


def test_another_tenants_adapters_are_not_there(api: Running) -> None:
    with api.http(api.new_key(unique())) as other:
        for name in ("sql", "default/sql"):
            assert refusal(generate(other, adapter_id=name)) == (404, "parameters.adapter_id")
            merged = generate(other, "/", merged_adapters={"ids": [name]})
            assert refusal(merged) == (404, "parameters.merged_adapters.ids")
