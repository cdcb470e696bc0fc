"""One HTTP request in the engine: its prompts, their messages, its deadlines, and its end.

A request may have up to 128 prompts. They are submitted a few at a time, so that one request never
fills the engine's queue, and the next one goes in when one is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from gossamer.api.admission import Ticket
from gossamer.api.errors import ApiError, timed_out, unavailable
from gossamer.api.mailbox import Inbox, Postbox
from gossamer.api.settings import Limits
from gossamer.engine.errors import EngineError
from gossamer.engine.messages import Done, Failed, Message, Request

if TYPE_CHECKING:
    from gossamer.engine.client import Engine


@dataclass
class Usage:
    """Tokens of a request so far."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def content(self) -> dict[str, object]:
        """As OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Generation(Inbox):
    """The messages of a request's prompts, until each had its final one. Runs in the event loop.

    Use: `start`, then `take` until `over`, and `close` in every case. `close` gives up what still
    runs; the hold on the adapters ends when the engine has confirmed the last end of all, which may
    be later.

    Args:
        requests: one for each prompt.
        at_once: how many of them are in the engine at the same time (see `prompts_at_once`).
        ticket: the place in the queue; given back by `close`.
        release: ends the hold on the adapters.
    """

    def __init__(
        self,
        engine: Engine,
        postbox: Postbox,
        requests: Sequence[Request],
        at_once: int,
        ticket: Ticket,
        release: Callable[[], None],
    ) -> None:
        super().__init__()
        self.requests = requests
        self.usage = Usage()
        self._engine = engine
        self._postbox = postbox
        self._at_once = at_once
        self._ticket = ticket
        self._release = release
        self._next = 0
        self._running: set[int] = set()
        self._silent: set[int] = set()
        self._closed = False
        self._timers: list[asyncio.TimerHandle] = []
        self._watcher: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        """Whether every prompt was answered to its end."""
        return self._next == len(self.requests) and not self._running and not self.failed

    def start(self, receive: Receive, limits: Limits) -> None:
        """Submit the first prompts, start the clocks, and watch for the client to go away.

        Raises:
            EngineError: the engine refused a prompt at once.
        """
        loop = asyncio.get_running_loop()
        while self._next < min(self._at_once, len(self.requests)):
            self._submit()
        first = unavailable(
            f"No token came within {limits.first_token_seconds:g} s.", 5.0, code="request_timeout"
        )
        whole = timed_out(f"The request took longer than {limits.request_seconds:g} s.")
        self._timers = [
            loop.call_later(limits.first_token_seconds, self.fail, first),
            loop.call_later(limits.request_seconds, self.fail, whole),
        ]
        self._watcher = loop.create_task(self._watch(receive))

    def put(self, prompt: int, message: Message) -> None:
        """Take a message in; keep the books; submit the next prompt in place of a finished one."""
        if prompt in self._silent:
            self._silent.remove(prompt)
            self._ticket.begun(self.requests[prompt].sampling.n)
        if isinstance(message, Done | Failed):
            self._running.discard(prompt)
        if self._closed:
            self._release_when_over()
        elif isinstance(message, Failed):
            self.fail(message.error)
        else:
            if isinstance(message, Done):
                self._settle(message)
            else:
                self._timers[0].cancel()
            super().put(prompt, message)

    def close(self) -> None:
        """Give up what still runs and every claim of the request. May be called again."""
        if self._closed:
            return
        self._closed = True
        for timer in self._timers:
            timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        self._next = len(self.requests)
        for prompt in self._running:
            self._engine.cancel(self.requests[prompt].id)
        self._ticket.leave()
        self._release_when_over()

    def _settle(self, final: Done) -> None:
        self.usage.prompt += final.prompt_tokens
        self.usage.completion += final.completion_tokens
        self.usage.cached += final.cached_tokens
        if self._next < len(self.requests):
            try:
                self._submit()
            except EngineError as error:
                self.fail(error)

    def _submit(self) -> None:
        prompt = self._next
        self._engine.submit(self.requests[prompt], self._postbox.slot(self, prompt))
        self._next += 1
        self._running.add(prompt)
        self._silent.add(prompt)

    def _release_when_over(self) -> None:
        if not self._running:
            self._release()

    async def _watch(self, receive: Receive) -> None:
        """The body has been read: what `receive` still has to tell is that the client has gone."""
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        except ApiError as error:  # more of a body than there may be
            self.fail(error)
            return
        self.fail(ClientDisconnect())


def prompts_at_once(limits: Limits, prompts: int, choices: int) -> int:
    """How many prompts of one request, of that many choices each, the engine gets at a time."""
    rows = min(limits.rows_at_once, limits.queued_per_tenant, limits.queued)
    return min(prompts, max(1, rows // choices))
