"""Messages become replies that OpenAI's own types read, whole and as events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gossamer.api.chat_format import ChatEvents, ChatFrame, ChatReply
from gossamer.api.completion_format import (
    CompletionEvents,
    CompletionFrame,
    CompletionReply,
    Prompt,
)
from gossamer.api.generation import Usage
from gossamer.api.tokens import TokenText
from gossamer.engine.messages import ChoiceEnd, Chunk, Message, PromptScored, TokenLogprob
from tests.tiny import EOS_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOKENS = TokenText(TOKENIZER)
USAGE = Usage(prompt=9, completion=2, cached=4)
SNOWMAN: list[int] = TOKENIZER.encode("☃")  # three tokens of a byte each
HOSTILE = 'line\nend\r\n"quote"\\ \u2028\u0085 é🦋 </script> data: x\n\n'


def events(text: str) -> list[Any]:
    """What a client makes of a stream: the JSON of each event."""
    assert text.isascii()
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def chat_frame(**options: Any) -> ChatFrame:
    values = {"choices": 1, "prompt": (5, 6), **options}
    return ChatFrame("chatcmpl-1", 7, "sql*0.5+b", tokens=TOKENS, **values)


def chat_messages() -> list[tuple[int, Message]]:
    scored = TokenLogprob(10, -0.5, ((10, -0.5), (11, -1.0)))
    return [
        (0, Chunk(0, HOSTILE, (10,), (scored,))),
        (0, Chunk(0, "", (11,), (scored,))),
        (0, ChoiceEnd(0, "stop", "\n\n")),
    ]


def test_a_chat_stream_has_the_documented_events_in_order() -> None:
    encoder = ChatEvents(chat_frame(), include_usage=True)
    found = events(encoder.encode(chat_messages()) + encoder.finish(USAGE))
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7}
    assert all({**chunk, **head, "model": "sql*0.5+b"} == chunk for chunk in found)
    assert [chunk["choices"] for chunk in found] == [
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
        [{"index": 0, "delta": {"content": HOSTILE}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": "\n\n"}],
        [],
    ]
    assert found[-1]["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 2,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk, strict=True)


def test_every_choice_gets_its_role_once_and_no_usage_unless_asked() -> None:
    encoder = ChatEvents(chat_frame(choices=3), include_usage=False)
    found = events(encoder.encode([(0, Chunk(2, "a", (10,)))]) + encoder.encode([]))
    roles = [c["choices"][0]["index"] for c in found if "role" in c["choices"][0]["delta"]]
    assert roles == [0, 1, 2]
    assert encoder.finish(USAGE) == ""


def test_logprobs_and_token_ids_come_with_every_token_even_without_text() -> None:
    encoder = ChatEvents(chat_frame(logprobs=True, token_ids=True), include_usage=False)
    role, first, second, _ = events(encoder.encode(chat_messages()))
    assert role["prompt_token_ids"] == [5, 6]
    assert [c["choices"][0]["token_ids"] for c in (first, second)] == [[10], [11]]
    for chunk in (first, second):
        choice = ChatCompletionChunk.model_validate(chunk, strict=True).choices[0]
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [t.logprob for t in choice.logprobs.content[0].top_logprobs] == [-0.5, -1.0]


def test_a_chat_reply_says_what_its_stream_says() -> None:
    reply = ChatReply(chat_frame(logprobs=True, token_ids=True))
    reply.add(chat_messages())
    content = reply.content(USAGE)
    parsed = ChatCompletion.model_validate(json.loads(json.dumps(content)), strict=True)
    choice = parsed.choices[0]
    assert choice.message.content == HOSTILE
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 2
    assert content["choices"][0]["token_ids"] == [10, 11]
    assert content["prompt_token_ids"] == [5, 6]
    assert parsed.usage is not None
    assert parsed.usage.total_tokens == 11


def frame(**options: Any) -> CompletionFrame:
    prompts = [Prompt("Count", (20, 21)), Prompt("to", (22, 23))]
    values = {"prompts": prompts, "per_prompt": 2, **options}
    return CompletionFrame("cmpl-1", 7, "base", tokens=TOKENS, **values)


def completion_messages() -> list[tuple[int, Message]]:
    """Two prompts of two choices each, interleaved; every choice says `p<prompt>c<choice>`."""
    said: list[tuple[int, Message]] = [
        (prompt, Chunk(choice, f"p{prompt}c{choice}", (30,)))
        for choice in (1, 0)
        for prompt in (1, 0)
    ]
    return said + [(p, ChoiceEnd(c, "length")) for p in (0, 1) for c in (0, 1)]


def test_choices_are_numbered_over_all_prompts() -> None:
    reply = CompletionReply(frame())
    reply.add(completion_messages())
    parsed = Completion.model_validate(json.loads(json.dumps(reply.content(USAGE))), strict=True)
    assert [(c.index, c.text) for c in parsed.choices] == [
        (0, "p0c0"),
        (1, "p0c1"),
        (2, "p1c0"),
        (3, "p1c1"),
    ]


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_of_several_prompts_adds_up_to_the_reply(echo: bool) -> None:
    reply = CompletionReply(frame(echo=echo))
    reply.add(completion_messages())
    expected = [(c["text"], c["finish_reason"]) for c in reply.content(USAGE)["choices"]]
    encoder = CompletionEvents(frame(echo=echo), include_usage=True)
    texts, ends = [""] * 4, [None] * 4
    stream = "".join(encoder.encode([message]) for message in completion_messages())
    for chunk in events(stream + encoder.finish(USAGE)):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]
    assert list(zip(texts, ends, strict=True)) == expected


def test_text_offsets_count_characters_also_where_a_character_has_three_tokens() -> None:
    assert len(SNOWMAN) == 3
    scored = [TokenLogprob(t, -1.0) for t in [*TOKENIZER.encode("a"), *SNOWMAN, *SNOWMAN, EOS_ID]]
    reply = CompletionReply(frame(prompts=[Prompt("", (1,))], per_prompt=1, logprobs=True))
    reply.add([(0, Chunk(0, "", (s.token,), (s,))) for s in scored])
    lists = reply.content(USAGE)["choices"][0]["logprobs"]
    assert lists["text_offset"] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert lists["tokens"][0] == "a"
    assert lists["tokens"][1] == "bytes:\\xe2"
    assert lists["tokens"][-1] == TOKENIZER.decode([EOS_ID])


def test_the_chosen_token_is_always_among_the_alternatives() -> None:
    reply = CompletionReply(frame(prompts=[Prompt("", (1,))], per_prompt=1, logprobs=True))
    one, two, three = TOKENIZER.encode("a") + TOKENIZER.encode("b") + TOKENIZER.encode("c")
    reply.add(
        [(0, Chunk(0, "", (three,), (TokenLogprob(three, -9.0, ((one, -1.0), (two, -2.0))),)))]
    )
    assert reply.content(USAGE)["choices"][0]["logprobs"]["top_logprobs"] == [
        {"a": -1.0, "b": -2.0, "c": -9.0}
    ]


@pytest.mark.parametrize("streamed", [False, True])
def test_an_echoed_prompt_is_scored_in_front_of_the_completion(streamed: bool) -> None:
    tokens = tuple(TOKENIZER.encode("Count to"))
    prompt = Prompt("Count to", tokens)
    scores = PromptScored((None, *(TokenLogprob(t, -0.5, ((t, -0.5),)) for t in tokens[1:])))
    messages: list[tuple[int, Message]] = [
        (0, scores),
        (0, Chunk(0, "!", (30,), (TokenLogprob(30, -3.0),))),
        (0, ChoiceEnd(0, "length")),
    ]
    options: Any = {"prompts": [prompt], "per_prompt": 1, "echo": True, "logprobs": True}
    if streamed:
        encoder = CompletionEvents(frame(**options), include_usage=False)
        found = [c["choices"][0] for c in events(encoder.encode(messages))]
        text = "".join(choice["text"] for choice in found)
        values = [v for c in found if c["logprobs"] for v in c["logprobs"]["token_logprobs"]]
        offsets = [v for c in found if c["logprobs"] for v in c["logprobs"]["text_offset"]]
    else:
        reply = CompletionReply(frame(**options))
        reply.add(messages)
        choice = reply.content(USAGE)["choices"][0]
        text, lists = choice["text"], choice["logprobs"]
        values, offsets = lists["token_logprobs"], lists["text_offset"]
    assert text == "Count to!"
    assert values == [None] + [-0.5] * (len(tokens) - 1) + [-3.0]
    assert offsets[0] == 0
    assert offsets[-1] == len("Count to")


def test_scores_that_do_not_fit_the_prompt_are_not_passed_on() -> None:
    reply = CompletionReply(
        frame(prompts=[Prompt("a", (1, 2))], per_prompt=1, echo=True, logprobs=True)
    )
    with pytest.raises(ValueError, match="zip"):
        reply.add([(0, PromptScored((None,)))])
