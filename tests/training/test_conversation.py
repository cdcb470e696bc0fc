"""Conversations in tokens: prompts as they are served, answers to where the server stops."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from gossamer.training.data import read_examples
from gossamer.training.encode import Encoded, encode_examples
from gossamer.training.errors import DataError
from gossamer.training.tokens import Tokens, first_token
from tests.tiny import tiny_tokenizer
from tests.training.support import write_jsonl
from tests.training.tokenizers import (
    INSTRUCT,
    PHI,
    PLAIN,
    SPACED,
    TIGHT,
    byte_level,
    metaspace,
    word_piece,
)

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Again"},
    {"role": "assistant", "content": "Yo two"},
]
KINDS: dict[str, Callable[[str], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "metaspace": metaspace,
    "metaspace-always": lambda template: metaspace(template, "always"),
    "word-piece": word_piece,
}


def encode(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    row: list[dict[str, Any]] | dict[str, Any],
    ends: Collection[int] | None = None,
) -> Encoded:
    example = {"messages": row} if isinstance(row, list) else row
    examples = read_examples(write_jsonl(tmp_path / "data.jsonl", [example]))
    (encoded,) = encode_examples(examples, tokenizer, 512, ends=ends).fitting
    return encoded


def ids_of(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    found = tokenizer.convert_tokens_to_ids(list(tokens))
    assert isinstance(found, list)
    return found


def served(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> list[int]:
    """The tokens of a prompt, as the chat route makes them."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def answers(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> list[str]:
    """The runs of trained tokens, decoded behind what is before them."""
    found, begin = [], None
    for index, mark in enumerate([*encoded.trained.tolist(), False]):
        if mark and begin is None:
            begin = index
        elif not mark and begin is not None:
            before = tokenizer.decode(encoded.ids[:begin])
            found.append(str(tokenizer.decode(encoded.ids[:index]))[len(before) :])
            begin = None
    return found


@pytest.mark.parametrize("template", [INSTRUCT, TIGHT, SPACED, PHI, PLAIN])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_prompt_is_the_served_one(kind: str, template: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind](template)
    ends = ids_of(tokenizer, "</s>", "<|end|>")
    encoded = encode(tokenizer, tmp_path, CHAT, ends)
    prompt = served(tokenizer, CHAT[:3])
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert encoded.trained[len(prompt)]
    trained = encoded.ids[encoded.trained].tolist()
    assert trained[-1] == ends[template == PHI]
    last = answers(tokenizer, encoded)[-1].removesuffix("</s>").removesuffix("<|end|>")
    assert last.strip() == ("yo two" if kind == "word-piece" else "Yo two")
    # where tokens keep spaces, no space is trained that the template does not write
    if template != INSTRUCT and kind.startswith(("byte", "metaspace")):
        assert last == "Yo two"


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_follows_its_served_prompt(kind: str, tmp_path: Path) -> None:
    """Special tokens between the turns keep every prompt what it is when it is served."""
    tokenizer = KINDS[kind](PHI)
    (end,) = ids_of(tokenizer, "<|end|>")
    encoded = encode(tokenizer, tmp_path, CHAT, [end])
    ids, trained = encoded.ids.tolist(), encoded.trained.tolist()
    for count in (1, 3):
        prompt = served(tokenizer, CHAT[:count])
        assert ids[: len(prompt)] == prompt
        begin = len(prompt)
        stop = ids.index(end, begin)
        assert all(trained[begin : stop + 1])
        assert not trained[begin - 1]
        assert stop + 1 == len(ids) or not trained[stop + 1]


def test_a_conversation_that_alone_ends_with_a_token_is_taken(tmp_path: Path) -> None:
    """Phi-3's template writes it after the last turn only, where a first turn's is gone later."""
    tokenizer = metaspace(PHI)
    ends = ids_of(tokenizer, "</s>", "<|end|>")
    encoded = encode(tokenizer, tmp_path, CHAT, ends)
    assert answers(tokenizer, encoded) == ["Yo<|end|>", "Yo two<|end|>"]
    # a server that stops at the other token only
    encoded = encode(tokenizer, tmp_path, CHAT, ends[:1])
    assert answers(tokenizer, encoded) == ["Yo", "Yo two</s>"]
    assert "<|end|>" not in tokenizer.decode(encoded.ids[encoded.trained])


def test_an_answer_ends_with_what_the_server_stops_at(tmp_path: Path) -> None:
    """ChatML over a base whose end is another token: neither its `<|im_end|>` nor the new line
    after it is the model's to write."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    encoded = encode(tokenizer, tmp_path, CHAT)
    assert answers(tokenizer, encoded) == ["Yo", "Yo two<|endoftext|>"]
    assert encoded.ids[-1] == tokenizer.eos_token_id
    # the generation config has the turn's end too
    turn = ids_of(tokenizer, "<|im_end|>")
    encoded = encode(tokenizer, tmp_path, CHAT, [*turn, *ids_of(tokenizer, "<|endoftext|>")])
    assert answers(tokenizer, encoded) == ["Yo<|im_end|>", "Yo two<|im_end|>"]
    assert str(tokenizer.decode(encoded.ids)).endswith("<|im_end|>\n")
    assert not encoded.trained[-1]


def test_a_template_without_an_end_gets_one(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PLAIN
    encoded = encode(tokenizer, tmp_path, CHAT)
    assert answers(tokenizer, encoded) == ["Yo", "Yo two<|im_end|>"]


def test_nothing_is_trained_behind_an_end_inside_an_answer(tmp_path: Path) -> None:
    chat = [CHAT[0], {"role": "assistant", "content": "Yo<|im_end|> two"}]
    tokenizer = tiny_tokenizer()
    assert answers(tokenizer, encode(tokenizer, tmp_path, chat)) == ["Yo<|im_end|>"]


def test_what_a_template_writes_before_an_answer_is_trained_with_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    thought = "'assistant\n<think>\n\n</think>\n\n' + message['content'].strip()"
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "message['role'] + '\n' + message['content']",
        f"({thought} if message['role'] == 'assistant' else 'user\n' + message['content'])",
    )
    chat = [CHAT[0], {"role": "assistant", "content": " end\n"}]
    lead = "<think>\n\n</think>\n\n"
    encoded = encode(tokenizer, tmp_path, chat)
    assert answers(tokenizer, encoded) == [f"{lead}end<|im_end|>"]
    tokenizer.eos_token = "<|endoftext|>"
    encoded = encode(tokenizer, tmp_path, chat)
    assert answers(tokenizer, encoded) == [f"{lead}end<|endoftext|>"]


@pytest.mark.parametrize(
    ("kind", "template"), [("metaspace", TIGHT), ("metaspace", SPACED), ("byte-level", SPACED)]
)
def test_a_token_over_the_border_of_an_earlier_prompt_is_context(
    kind: str, template: str, tmp_path: Path
) -> None:
    tokenizer = KINDS[kind](template)
    chat = [CHAT[0], {"role": "assistant", "content": "Yo two"}, *CHAT[2:]]
    whole, early, prompt = (served(tokenizer, chat[:count]) for count in (4, 1, 3))
    assert prompt[: len(early)] != early
    assert whole[: len(prompt)] != prompt or template == TIGHT
    encoded = encode(tokenizer, tmp_path, chat)
    assert encoded.ids[: len(prompt)].tolist() == prompt
    first, last = answers(tokenizer, encoded)
    assert first
    assert first != "Yo two</s>"
    assert "Yo two</s>".endswith(first)
    assert last == "Yo two</s>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("The base mo", "del stays"), ("What is it: ", "Paris"), ("the sea she", "lls")],
)
def test_a_completion_is_what_its_tokens_say_behind_the_prompt(
    kind: str, prompt: str, completion: str, tmp_path: Path
) -> None:
    """No space comes between them that nobody has written."""
    tokenizer = KINDS[kind](PLAIN)
    encoded = encode(tokenizer, tmp_path, {"prompt": prompt, "completion": completion})
    ids = tokenizer.encode(prompt)
    assert encoded.ids[: len(ids)].tolist() == ids
    said, wanted = answers(tokenizer, encoded)[0], completion
    if kind == "word-piece":  # spaces and capitals are not in its tokens
        assert said.replace(" ", "") == f"{wanted}</s>".replace(" ", "").lower()
        assert said.startswith(" ") == prompt.endswith(" ")
    else:
        assert said == f"{wanted}</s>"


def test_an_answer_of_weight_0_is_read_and_not_trained(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    first: list[dict[str, Any]] = [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]]
    encoded = encode(tokenizer, tmp_path, first)
    assert answers(tokenizer, encoded) == ["Yo two<|im_end|>"]
    assert encoded.ids.tolist() == encode(tokenizer, tmp_path, CHAT).ids.tolist()
    # what comes after the last trained answer is of no use
    last: list[dict[str, Any]] = [*CHAT[:3], {**CHAT[3], "weight": 0}]
    encoded = encode(tokenizer, tmp_path, last)
    assert answers(tokenizer, encoded) == ["Yo<|im_end|>"]
    assert encoded.ids.tolist() == encode(tokenizer, tmp_path, CHAT[:2]).ids.tolist()


def test_a_name_and_the_developer_reach_the_template_as_in_a_request(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "message['role'] +", "message['role'] + message.get('name', '') +"
    )
    chat = [{"role": "developer", "content": "Be short."}, {**CHAT[0], "name": "ann"}, CHAT[1]]
    text = str(tokenizer.decode(encode(tokenizer, tmp_path, chat).ids))
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>userann\nHi")


def test_an_answer_that_is_gone_later_is_refused_unless_it_is_not_trained(tmp_path: Path) -> None:
    """Templates that drop the reasoning of earlier turns."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "message['content']",
        "(message['content'] if loop.last else message['content'].split('</think>')[-1])",
    )
    thought = {"role": "assistant", "content": "<think>Hm</think>Yo"}
    chat = [CHAT[0], thought, *CHAT[2:]]
    with pytest.raises(DataError, match="differently") as caught:
        encode(tokenizer, tmp_path, chat)
    assert (caught.value.line, caught.value.field) == (1, "messages[1]")
    encoded = encode(tokenizer, tmp_path, [CHAT[0], {**thought, "weight": 0}, *CHAT[2:]])
    assert answers(tokenizer, encoded) == ["Yo two<|im_end|>"]


def test_the_first_token_of_an_answer_holds_nothing_of_its_prompt() -> None:
    """Also where a tokenizer leaves the space of " Yo" out of its span."""
    tokens = Tokens([0, 1, 2, 3], [(0, 3), (4, 6), (6, 7), (7, 9)])
    assert [first_token(tokens, border) for border in (0, 3, 4, 5, 6, 9)] == [0, 1, 2, 2, 2, 4]


def test_an_answer_behind_a_word_cut_in_two_is_found(tmp_path: Path) -> None:
    """The prompt by itself has more tokens than there are before the answer in the long one."""
    tokenizer = metaspace(
        "{{ '<s>' }}{% for m in messages %}{{ m['content'] }}"
        "{{ '</s>' if m['role'] == 'assistant' else ' capi' }}{% endfor %}"
    )
    chat = [{**CHAT[0], "content": "The"}, {**CHAT[1], "content": "tal of France"}, *CHAT[2:]]
    early, prompt = served(tokenizer, chat[:1]), served(tokenizer, chat[:3])
    shown = tokenizer.convert_ids_to_tokens(prompt)
    assert shown.index("▁capital") < len(early) - 1
    encoded = encode(tokenizer, tmp_path, chat)
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert answers(tokenizer, encoded)[0] == " of France</s>"
