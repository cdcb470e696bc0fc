"""`/v1/chat/completions` through the openai client, against a real engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import BadRequestError
from openai.types.chat import ChatCompletion

from tests.api.running import Running
from tests.tiny import tiny_tokenizer

MESSAGES: Any = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is the capital of France?"},
]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 10, "extra_body": {"ignore_eos": True}}


def chat(api: Running, **options: Any) -> ChatCompletion:
    options = {"model": "base", "messages": MESSAGES, **GREEDY, **options}
    answer: ChatCompletion = api.client().chat.completions.create(**options)
    return answer


def test_the_conversation_is_rendered_with_the_template_of_the_base(api: Running) -> None:
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    answer = chat(api)
    same = api.client().completions.create(model="base", prompt=str(text), **GREEDY)
    assert answer.choices[0].message.content == same.choices[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode(str(text)))
    assert answer.id.startswith("chatcmpl-")


def test_parts_of_text_and_the_developer_role_are_what_they_mean(api: Running) -> None:
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be short."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is the capital "},
                {"type": "text", "text": "of France?"},
            ],
        },
    ]
    assert (
        chat(api, messages=parts).choices[0].message.content == chat(api).choices[0].message.content
    )


def test_a_stream_adds_up_to_the_plain_reply(api: Running) -> None:
    plain = chat(api, n=2, logprobs=True, top_logprobs=2)
    texts, roles, logprobs = ["", ""], [], [[], []]  # type: ignore[var-annotated]
    ends: list[Any] = [None, None]
    chunks = list(
        api.client().chat.completions.create(
            model="base",
            messages=MESSAGES,
            n=2,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.delta.role:
            roles.append(choice.index)
        if choice.logprobs:
            logprobs[choice.index] += choice.logprobs.content or []
        ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert sorted(roles) == [0, 1]
    for index, expected in enumerate(plain.choices):
        assert texts[index] == expected.message.content
        assert ends[index] == expected.finish_reason
        assert expected.logprobs is not None
        assert [t.token for t in logprobs[index]] == [
            t.token for t in expected.logprobs.content or []
        ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert plain.usage is not None
    assert chunks[-1].usage.total_tokens == plain.usage.total_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_bytes_of_the_wire_are_as_documented(api: Running) -> None:
    with (
        api.http() as http,
        http.stream(
            "POST",
            "/v1/chat/completions",
            json={"model": "base", "messages": MESSAGES, "max_tokens": 3, "stream": True},
        ) as reply,
    ):
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["x-gossamer-mix"].startswith("sha256:")
        lines = reply.read().decode("ascii").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert chunks[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    ]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    for chunk in chunks[1:-1]:
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        assert set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"}


def test_the_answer_may_fill_the_context_when_no_limit_is_given(api: Running) -> None:
    stop = tiny_tokenizer().eos_token_id
    answer = chat(api, max_tokens=None, logit_bias={str(stop): 50}, extra_body={})
    assert answer.choices[0].finish_reason == "stop"


def test_max_completion_tokens_is_the_other_name_of_max_tokens(api: Running) -> None:
    answer = chat(api, max_tokens=None, max_completion_tokens=4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    with pytest.raises(BadRequestError):
        chat(api, max_tokens=3, max_completion_tokens=4)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tool_choice": "none"}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}],
                    }
                ]
            },
            "messages.0.content.0.type",
        ),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(
    api: Running, options: dict[str, Any], param: str
) -> None:
    with api.http() as http:
        reply = http.post(
            "/v1/chat/completions", json={"model": "base", "messages": MESSAGES, **options}
        )
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"].startswith(param), error
    assert error["type"] == "invalid_request_error"


def test_no_address_is_fetched_for_a_request(api: Running) -> None:
    """A picture's URL is refused before anybody could ask for it."""
    part = {"type": "image_url", "image_url": {"url": f"{api.url}/health/live"}}
    with api.http() as http:
        before = http.get("/metrics").text
        http.post(
            "/v1/chat/completions",
            json={"model": "base", "messages": [{"role": "user", "content": [part]}]},
        )
        after = http.get("/metrics").text
    count = 'gossamer_http_requests_total{method="GET",route="/health/live",status="200"}'
    assert [line for line in before.splitlines() if line.startswith(count)] == [
        line for line in after.splitlines() if line.startswith(count)
    ]
