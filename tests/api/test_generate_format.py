"""What becomes of a character that is never completed, in LoRAX's replies and events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gossamer.api.generate_format import GenerateEvents, GenerateFrame, GenerateReply
from gossamer.api.generation import Usage
from gossamer.api.tokens import TokenText
from gossamer.engine.messages import ChoiceEnd, Chunk, Message, TokenLogprob
from tests.tiny import EOS_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
#: `A`, then the two bytes of `é`, as a byte-level vocabulary spells them.
A, FIRST, SECOND = (TOKENIZER.get_vocab()[piece] for piece in ("A", "Ã", "©"))
END = ChoiceEnd(0, "stop", EOS_ID)


def chunks(*tokens: tuple[int, str]) -> list[Message]:
    return [Chunk(0, text, (token,), (TokenLogprob(token, -1.0),)) for token, text in tokens]


def replied(messages: list[Message]) -> dict[str, Any]:
    reply = GenerateReply(GenerateFrame(TokenText(TOKENIZER), (1,), details=True))
    for message in messages:
        reply.add([(0, message)])
    return reply.content(Usage())


def streamed(messages: list[Message]) -> list[list[dict[str, Any]]]:
    """The events that each message brings, then those of the end."""
    encoder = GenerateEvents(GenerateFrame(TokenText(TOKENIZER), (1,), details=True))
    sent = [encoder.encode([(0, message)]) for message in messages] + [encoder.finish(Usage())]
    return [
        [json.loads(one.removeprefix("data:")) for one in text.split("\n\n") if one]
        for text in sent
    ]


@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        ([(A, "A"), (FIRST, ""), (SECOND, "é"), (EOS_ID, "")], ["A", "", "é", "</s>"]),
        ([(A, "A"), (FIRST, ""), (EOS_ID, "\ufffd")], ["A", "\ufffd", "</s>"]),
        ([(FIRST, ""), (EOS_ID, ""), (EOS_ID, "\ufffd")], ["\ufffd", "</s>", "</s>"]),
        ([(FIRST, ""), (EOS_ID, ""), (A, "\ufffdA")], ["", "</s>", "\ufffdA"]),
        ([(A, "A"), (FIRST, "\ufffd")], ["A", "\ufffd"]),
        ([(EOS_ID, "")], ["</s>"]),
    ],
)
def test_the_texts_of_tokens_that_are_not_special_add_up(
    tokens: list[tuple[int, str]], texts: list[str]
) -> None:
    messages = [*chunks(*tokens), END]
    reply = replied(messages)
    shown = reply["details"]["tokens"]
    names = [TOKENIZER.decode([EOS_ID]) if text == "</s>" else text for text in texts]
    assert [token["text"] for token in shown] == names
    plain = "".join(token["text"] for token in shown if not token["special"])
    assert plain == reply["generated_text"] == "".join(text for _, text in tokens)
    events = [event for part in streamed(messages) for event in part]
    assert [event["token"] for event in events] == shown
    assert [event["generated_text"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["generated_text"] == plain


def test_an_event_waits_for_the_next_token_and_for_the_character() -> None:
    messages = [*chunks((A, "A"), (FIRST, ""), (EOS_ID, ""), (SECOND, "é"), (A, "A")), END]
    assert [len(events) for events in streamed(messages)] == [0, 1, 0, 2, 1, 0, 1]
