"""What the routes say of their errors and of their streams in /openapi.json."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from gossamer.api.schemas.compatibility import GenerateEvent
from gossamer.api.schemas.replies import ErrorReply

_TEXTS = {
    400: "A field of the request is not acceptable; `param` names it.",
    401: "The API key is missing or not valid.",
    403: "The API key does not allow this.",
    404: "There is nothing of that name, or it is another tenant's.",
    408: "The body took too long to arrive.",
    409: "It contradicts the present state; `code` says how.",
    413: "The body, or what the tenant keeps, is too large.",
    422: "The adapter cannot be used with this base.",
    429: "Too much of this tenant is under way; `retry-after` says when to come again.",
    500: "The server had an error.",
    503: "The server cannot do it now; `retry-after` says when to come again.",
    507: "No space is left.",
}
#: what every route that wants a key may answer
_ALWAYS = (400, 401, 500, 503)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for these statuses and the ones that any route may answer."""
    return {
        status: {"model": ErrorReply, "description": _TEXTS[status]}
        for status in sorted({*_ALWAYS, *statuses})
    }


_DONE = "The last one is `[DONE]`."
_OF_GENERATE = "The last one has `generated_text`."
#: path of a POST that streams → what the data of its events is, in words, and the model if any
_STREAMS: dict[str, tuple[str, type[BaseModel] | None]] = {
    "/v1/completions": (f"A `text_completion` with new text of one choice. {_DONE}", None),
    "/v1/chat/completions": (f"A `chat.completion.chunk`. {_DONE}", None),
    "/generate_stream": (f"One token. {_OF_GENERATE}", GenerateEvent),
    "/": (f"One token. {_OF_GENERATE}", GenerateEvent),
}
_FAILED = "After a failure the last one is an error, as in a plain reply, and the stream ends."
_SCHEMAS = "#/components/schemas/"


def document_streams(schema: dict[str, Any]) -> None:
    """Tell in FastAPI's description which replies may be streams of events, and of what events."""
    for path, (about, model) in _STREAMS.items():
        data: dict[str, Any] = {"type": "string", "description": f"{about} {_FAILED}"}
        if model is not None:
            data["contentMediaType"] = "application/json"
            data["contentSchema"] = {"$ref": _SCHEMAS + model.__name__}
            described = model.model_json_schema(ref_template=_SCHEMAS + "{model}")
            schemas = schema["components"]["schemas"]
            schemas.update(described.pop("$defs", {}))
            schemas[model.__name__] = described
        answer = schema["paths"][path]["post"]["responses"]["200"]
        answer.setdefault("content", {})["text/event-stream"] = {
            "schema": {"type": "object", "required": ["data"], "properties": {"data": data}}
        }
