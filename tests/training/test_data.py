"""Reading examples: what is wrong is said with the file, the line and the field."""

import hashlib
import json
from pathlib import Path

import pytest

from gossamer.training.data import Completion, Conversation, read_examples
from gossamer.training.errors import DataError, StoppedError
from tests.training.support import write_jsonl

GOOD = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_both_kinds_of_examples_are_read_in_order(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", [GOOD, CHAT, GOOD])
    examples = read_examples(file)
    kinds = [type(located.example) for located in examples.located]
    assert kinds == [Completion, Conversation, Completion]
    assert [located.line for located in examples.located] == [1, 2, 3]


def test_blank_lines_and_a_byte_order_mark_are_no_examples(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\n  \n" + b'{"prompt":1}\n')
    with pytest.raises(DataError) as caught:
        read_examples(file)
    assert caught.value.line == 4


def message(role: object, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


YES = message("assistant", "b")
PART = {"type": "text", "text": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        ("[1]", None, "array"),
        ("3", None, "number"),
        ("null", None, "null"),
        ('"text"', None, "string"),
        ("{", None, "not JSON"),
        ("[" * 100_000, None, "not JSON"),
        ({}, "prompt", "required"),
        ({"prompt": "a"}, "completion", "required"),
        ({"prompt": "a", "completion": ""}, "completion", "at least 1"),
        ({"prompt": "", "completion": "b"}, "prompt", "at least 1"),
        ({"prompt": "a", "completion": 5}, "completion", "string"),
        ({"prompt": "a", "completion": "b", "weight": 2}, "weight", "not permitted"),
        ({**CHAT, "prompt": "a"}, "prompt", "not permitted"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [message("user", "a")]}, "messages", "at least 2"),
        (
            {"messages": [message("user", "a"), message("robot", "b")]},
            "messages[1].role",
            "'assistant'",
        ),
        (
            {"messages": [message("user", "a"), message("assistant", None)]},
            "messages[1].content",
            "string",
        ),
        ({"messages": [message("user", "a"), {"role": "assistant"}]}, "messages[1].content", "req"),
        (
            {"messages": [message("user", "a"), message("assistant", "b"), message("user", "c")]},
            "messages[2].role",
            "last message",
        ),
        (
            {"messages": [message("assistant", "a"), message("assistant", "b")]},
            "messages[0].role",
            "before it",
        ),
        ({"messages": [{**message("user", "a"), "weight": 1}, YES]}, "messages[0].weight", "only"),
        ({"messages": [message("user", "a"), {**YES, "weight": 2}]}, "messages[1].weight",
         "equal to 1"),
        ({"messages": [message("user", "a"), {**YES, "weight": True}]}, "messages[1].weight",
         "integer"),
        ({"messages": [message("user", "a"), {**YES, "weight": 0}]}, "messages", "weight 0"),
        ({"messages": [{**message("user", "a"), "name": 5}, YES]}, "messages[0].name", "string"),
        ({"messages": [{**message("user", "a"), "nam": "b"}, YES]}, "messages[0].nam", "not perm"),
        ({"messages": [message("user", []), YES]}, "messages[0].content", "at least 1"),
        ({"messages": [message("user", [""]), YES]}, "messages[0].content[0]", "a part is"),
        ({"messages": [message("user", [PART, IMAGE]), YES]}, "messages[0].content[1].type",
         "'image_url'"),
        ({"messages": [message("user", [{"type": "text"}]), YES]}, "messages[0].content[0].text",
         "string"),
        ({"messages": [message("user", [{**PART, "x": 1}]), YES]}, "messages[0].content[0].x",
         "not permitted"),
        ({**CHAT, "tools": []}, "tools", "tools are not trained"),
        ({**CHAT, "functions": [{}]}, "functions", "tools are not trained"),
        ({**CHAT, "parallel_tool_calls": False}, "parallel_tool_calls", "tools are not trained"),
        ({"messages": [message("user", "a"), {"role": "assistant", "tool_calls": [{}]}]},
         "messages[1].tool_calls", "tools are not trained"),
        ({"messages": [message("user", "a"), {**YES, "function_call": {}}]},
         "messages[1].function_call", "tools are not trained"),
        ({"messages": [message("user", "a"), {**YES, "refusal": "no"}]}, "messages[1].refusal",
         "content"),
        ({"messages": [message("user", "a"), message("tool", "b"), YES]}, "messages[1].role",
         "tools are not trained"),
    ],
)  # fmt: skip
def test_an_error_names_the_line_and_the_field(
    tmp_path: Path, row: object, field: str | None, problem: str
) -> None:
    file = tmp_path / "data.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    file.write_text(json.dumps(GOOD) + "\n" + text + "\n")
    with pytest.raises(DataError) as caught:
        read_examples(file)
    error = caught.value
    assert (error.file, error.line, error.field) == (file, 2, field)
    assert problem in error.problem
    assert f"line 2{f', {field}' if field else ''}" in str(error)


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff", "completion": "b"}\n')
    with pytest.raises(DataError, match="line 2") as caught:
        read_examples(file)
    assert "UTF-8" in caught.value.problem


def test_a_file_without_examples_and_no_file_are_errors(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="no examples"):
        read_examples(empty)
    with pytest.raises(DataError, match="No such file"):
        read_examples(tmp_path / "missing.jsonl")


def test_the_digest_is_of_the_examples_not_of_their_spelling(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", [GOOD, CHAT])
    spaced = tmp_path / "b.jsonl"
    spaced.write_text('\n{"completion":  "b", "prompt": "\\u0061"}\n\n' + json.dumps(CHAT))
    assert read_examples(plain).digest == read_examples(spaced).digest
    other = write_jsonl(tmp_path / "c.jsonl", [CHAT, GOOD])
    assert read_examples(plain).digest != read_examples(other).digest


def test_openai_fields_are_taken_and_one_example_has_one_digest(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    rich = {"messages": [{**message("developer", parts), "name": None}, {**YES, "weight": 1}]}
    plain = {"messages": [message("system", "a b"), YES]}
    example = read_examples(write_jsonl(tmp_path / "a.jsonl", [rich])).located[0].example
    assert isinstance(example, Conversation)
    assert [one.plain() for one in example.messages] == plain["messages"]
    assert example.messages[1].trained
    digests = [
        read_examples(write_jsonl(tmp_path / "b.jsonl", [{"messages": messages}])).digest
        for messages in (
            plain["messages"],
            rich["messages"],
            [{**message("system", "a b"), "name": "ann"}, YES],
            [message("system", "a b"), {**YES, "weight": 0}, YES],
            [message("system", "a b"), YES, YES],
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_the_digest_of_plain_examples_is_what_it_ever_was(tmp_path: Path) -> None:
    """A run that was cut off before an upgrade goes on after it."""
    file = write_jsonl(tmp_path / "a.jsonl", [GOOD, CHAT])
    text = (
        '{"prompt":"a","completion":"b"}\n'
        '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n'
    )
    assert read_examples(file).digest == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_reading_stops_when_it_is_told_to(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", [GOOD] * 400)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(len(asked))
        return len(asked) == 3

    with pytest.raises(StoppedError) as caught:
        read_examples(file, stop=stop)
    assert (caught.value.step, caught.value.resumable) == (0, False)
    assert len(asked) == 3
    assert len(read_examples(file).located) == 400
