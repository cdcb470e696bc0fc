"""Training examples: JSON lines, checked one by one, so that an error can say where it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gossamer.training.errors import DataError


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class Conversation(_Strict):
    """`{"messages": […]}`: the assistant's turns are trained."""

    messages: list[Message] = Field(min_length=2)


class Completion(_Strict):
    """`{"prompt": …, "completion": …}`: the completion is trained, and to stop after it."""

    prompt: str = Field(min_length=1)
    completion: str = Field(min_length=1)


Example = Conversation | Completion


@dataclass(frozen=True)
class Located:
    """An example and the line it came from, counted from 1."""

    example: Example
    line: int


@dataclass(frozen=True)
class Examples:
    """The examples of a file.

    Attributes:
        file: it.
        located: the examples in the file's order.
        digest: `sha256:…` over their canonical JSON, one a line: the same examples have one digest
            however the file is spaced and its keys are ordered.
    """

    file: Path
    located: Sequence[Located]
    digest: str


def read_examples(file: Path) -> Examples:
    """Read and check a JSONL file; blank lines are skipped.

    Raises:
        DataError: it cannot be read, or a line is no example; names the file, line and field.
    """
    state = hashlib.sha256()
    located = []
    for number, text in _lines(file):
        if not text.strip():
            continue
        example = _parse(file, number, text)
        canonical = json.dumps(example.model_dump(), ensure_ascii=False, separators=(",", ":"))
        state.update(canonical.encode("utf-8", "surrogatepass") + b"\n")
        located.append(Located(example, number))
    if not located:
        raise DataError(file, "the file has no examples")
    return Examples(file, tuple(located), f"sha256:{state.hexdigest()}")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(file, f"not UTF-8: {error.reason}", number) from error
    except OSError as error:
        raise DataError(file, error.strerror or str(error)) from error


def _parse(file: Path, line: int, text: str) -> Example:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(file, f"not JSON: {error}", line) from error
    if not isinstance(value, dict):
        raise DataError(file, f"a JSON {_json_type(value)}, not an object", line)
    kind = Conversation if "messages" in value else Completion
    try:
        example = kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise DataError(file, first["msg"].lower(), line, _path(first["loc"])) from error
    if isinstance(example, Conversation):
        _check_turns(file, line, example.messages)
    return example


def _check_turns(file: Path, line: int, messages: Sequence[Message]) -> None:
    if messages[-1].role != "assistant":
        problem = f"the last message must be the assistant's, not the {messages[-1].role}'s"
        raise DataError(file, problem, line, f"messages[{len(messages) - 1}].role")
    if messages[0].role == "assistant":
        problem = "an assistant's message needs one before it"
        raise DataError(file, problem, line, "messages[0].role")


def _path(location: tuple[str | int, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
