"""Lists in pages, as OpenAI's clients go through them: `after` the last one seen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Cursor = Annotated[str, Field(max_length=128, description="Id of the last one seen.")]
Order = Literal["asc", "desc"]


class QueryModel(BaseModel):
    """The query of a request: closed, as its body is. Its values come as texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ListReply(BaseModel):
    """One page; subclasses say what `data` is made of."""

    object: Literal["list"] = "list"
    has_more: bool
    first_id: str | None
    last_id: str | None


def page_of(items: list[Any], *, has_more: bool) -> dict[str, Any]:
    """The fields of a `ListReply` with these items, each of which has an `id`."""
    return {
        "data": items,
        "has_more": has_more,
        "first_id": items[0].id if items else None,
        "last_id": items[-1].id if items else None,
    }
