"""Server-sent events: the reply of a stream, event by event, as the engine's messages come."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gossamer.api.error_table import to_api_error
from gossamer.api.errors import ApiError
from gossamer.api.generation import Generation, Usage
from gossamer.api.metrics import Metrics
from gossamer.engine.errors import EngineError
from gossamer.engine.messages import Message

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # nginx would hold events back
    "x-accel-buffering": "no",
}
DONE = b"data: [DONE]\n\n"


class Encoder(Protocol):
    """Makes the events of one kind of reply."""

    def encode(self, messages: Iterable[tuple[int, Message]]) -> str:
        """The events for messages in order; may be empty. ASCII."""

    def finish(self, usage: Usage) -> str:
        """The events after the last message, without `[DONE]`."""


class EventStream(Response):
    """The reply: `first`, then events until the generation is over or fails.

    A failure after the headers is an event with an error, and the stream ends without `[DONE]`.
    """

    def __init__(
        self,
        generation: Generation,
        first: list[tuple[int, Message]],
        encoder: Encoder,
        metrics: Metrics,
        headers: Mapping[str, str],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**_HEADERS, **headers})
        self._generation = generation
        self._first = first
        self._encoder = encoder
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        del scope, receive  # the generation watches `receive` already
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        self._metrics.streams.inc()
        try:
            await send(start)
            last = await self._events(send)
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            self._metrics.streams.dec()
            self._generation.close()

    async def _events(self, send: Send) -> bytes:
        """Send all but the last events; returns those."""
        generation, encode = self._generation, self._encoder.encode
        messages, before = self._first, time.monotonic()
        try:
            while True:
                # One write for all that has come: a busy loop must not make more of them.
                events = encode(messages)
                if generation.over:
                    return (events + self._encoder.finish(generation.usage)).encode("ascii") + DONE
                if events:
                    body = events.encode("ascii")
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                messages = await generation.take()
                now = time.monotonic()
                self._metrics.between_tokens(now - before)
                before = now
        except (EngineError, ApiError) as error:
            return event(to_api_error(error).content()).encode("ascii")


def event(content: object) -> str:
    """One event. JSON escapes line ends, and ASCII keeps clients that split at U+2028 whole."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
