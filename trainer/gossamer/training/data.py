"""Training examples: JSON lines, checked one by one, so that an error can say where it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gossamer.training.errors import DataError, StoppedError
from gossamer.training.openai_format import NotTrainableError, flattened

_T = TypeVar("_T")

#: Items between two questions whether to stop: some 30 ms of encoding on one core.
_ASK_EVERY = 64


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Message(_Strict):
    """One turn of a conversation.

    Attributes:
        name: of who says it; for the chat template.
        weight: of an answer, 0: it is not trained, only read.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str = Field(min_length=1)
    name: str | None = None
    weight: int = Field(default=1, ge=0, le=1)

    @property
    def trained(self) -> bool:
        """Whether it is an answer to train on."""
        return self.role == "assistant" and self.weight != 0

    def plain(self) -> dict[str, str]:
        """What the chat template is given: as from the server's chat route, `developer` is
        `system`."""
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": self.content, **named}


class Conversation(_Strict):
    """`{"messages": […]}`: the assistant's turns are trained, but for those of weight 0."""

    messages: list[Message] = Field(min_length=2)

    def canonical(self) -> dict[str, Any]:
        """Its JSON, the same for all ways to write the example."""
        weights = [{} if one.weight else {"weight": 0} for one in self.messages]
        plain = [one.plain() | weight for one, weight in zip(self.messages, weights, strict=True)]
        return {"messages": plain}


class Completion(_Strict):
    """`{"prompt": …, "completion": …}`: the completion is trained, and to stop after it."""

    prompt: str = Field(min_length=1)
    completion: str = Field(min_length=1)

    def canonical(self) -> dict[str, Any]:
        """Its JSON."""
        return self.model_dump()


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


def never() -> bool:
    """Nobody wants it stopped."""
    return False


def unless_stopped(items: Iterable[_T], stop: Callable[[], bool]) -> Iterator[_T]:
    """The items, as long as `stop`, asked after every few dozen of them, does not say so.

    Raises:
        StoppedError: it did, before the first step.
    """
    for index, item in enumerate(items):
        if index and index % _ASK_EVERY == 0 and stop():
            raise StoppedError(0, resumable=False)
        yield item


def read_examples(file: Path, *, stop: Callable[[], bool] = never) -> Examples:
    """Read and check a JSONL file; blank lines are skipped.

    Args:
        stop: asked every few dozen lines.

    Raises:
        DataError: it cannot be read, or a line is no example; names the file, line and field.
        StoppedError: `stop` said so.
    """
    state = hashlib.sha256()
    located = []
    for number, text in unless_stopped(_lines(file), stop):
        if not text.strip():
            continue
        example = _parse(file, number, text)
        canonical = json.dumps(example.canonical(), ensure_ascii=False, separators=(",", ":"))
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
        example = kind.model_validate(flattened(value))
    except NotTrainableError as error:
        raise DataError(file, str(error), line, _path(error.location)) from error
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
    for index, message in enumerate(messages):
        if message.role != "assistant" and "weight" in message.model_fields_set:
            problem = "only an assistant's message has a weight"
            raise DataError(file, problem, line, f"messages[{index}].weight")
    if not any(message.trained for message in messages):
        problem = "every answer has the weight 0: there is nothing to train"
        raise DataError(file, problem, line, "messages")


def _path(location: tuple[str | int, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
