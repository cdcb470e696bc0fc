"""What OpenAI's training files may hold beyond text in a `content`: taken, or refused by name."""

from __future__ import annotations

from typing import Any

Location = tuple[str | int, ...]

_TOOLS = "tools are not trained: the chat template of the base is given text only"
#: fields of OpenAI's format that nothing here can be made of, and why
_FIELDS = {
    "tools": _TOOLS,
    "parallel_tool_calls": _TOOLS,
    "functions": _TOOLS,
}
_MESSAGE_FIELDS = {
    "tool_calls": _TOOLS,
    "tool_call_id": _TOOLS,
    "function_call": _TOOLS,
    "audio": "only text is trained",
    "refusal": "give what the assistant should say as its content",
}
_ROLES = {"tool": _TOOLS, "function": _TOOLS}


class NotTrainableError(ValueError):
    """An example has something in it that cannot be trained.

    Attributes:
        location: the path to it.
    """

    def __init__(self, problem: str, location: Location) -> None:
        super().__init__(problem)
        self.location = location


def flattened(example: dict[str, Any]) -> dict[str, Any]:
    """The example, contents of text parts made one text, joined as the server joins a request's.

    What is no message, or no content, is left for the check of the whole example.

    Raises:
        NotTrainableError: it has tools, images, or other things that are not text.
    """
    _refuse(example, _FIELDS, ())
    messages = example.get("messages")
    if not isinstance(messages, list):
        return example
    flat = [_message(message, ("messages", index)) for index, message in enumerate(messages)]
    return {**example, "messages": flat}


def _message(message: Any, where: Location) -> Any:
    if not isinstance(message, dict):
        return message
    _refuse(message, _MESSAGE_FIELDS, where)
    role = message.get("role")
    if isinstance(role, str) and role in _ROLES:
        raise NotTrainableError(_ROLES[role], (*where, "role"))
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [_text(part, (*where, "content", index)) for index, part in enumerate(content)]
    return {**message, "content": "".join(parts)}


def _text(part: Any, where: Location) -> str:
    if not isinstance(part, dict):
        raise NotTrainableError('a part is {"type": "text", "text": …}', where)
    if part.get("type") != "text":
        problem = f"a part of type {part.get('type')!r}; only text is trained"
        raise NotTrainableError(problem, (*where, "type"))
    if not isinstance(part.get("text"), str):
        raise NotTrainableError("input should be a valid string", (*where, "text"))
    for key in part.keys() - {"type", "text"}:
        raise NotTrainableError("extra inputs are not permitted", (*where, key))
    return str(part["text"])


def _refuse(value: dict[str, Any], fields: dict[str, str], where: Location) -> None:
    for field, problem in fields.items():
        if value.get(field) is not None:
            raise NotTrainableError(problem, (*where, field))
