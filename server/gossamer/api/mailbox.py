"""From the engine's thread to the event loop: many messages, one wake-up.

A step of the engine delivers a message for each of its rows. Waking the loop for each would cost
16 wake-ups a step with 16 rows; a `Postbox` is emptied once for all that have come by then.
"""

from __future__ import annotations

import asyncio
from collections import deque

from gossamer.engine.messages import Deliver, Message


class Postbox:
    """Where the engine leaves its messages. `open` it in the event loop that takes them out."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[tuple[Inbox, int, Message]] = deque()
        self._woken = False

    def open(self) -> None:
        """Hand the messages out in the running event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """The event loop is about to end: drop what nobody will take."""
        self._loop = None
        self._waiting.clear()

    def slot(self, inbox: Inbox, prompt: int) -> Deliver:
        """What the engine calls, from its own thread, with the messages of one prompt."""

        def deliver(message: Message) -> None:
            self._waiting.append((inbox, prompt, message))
            loop = self._loop
            if self._woken or loop is None:
                return
            self._woken = True
            loop.call_soon_threadsafe(self._empty)

        return deliver

    def _empty(self) -> None:
        # Before the first pop: a message that comes from now on is popped here or wakes anew.
        self._woken = False
        while self._waiting:
            inbox, prompt, message = self._waiting.popleft()
            inbox.put(prompt, message)


class Inbox:
    """The messages of one HTTP request, in order, with the index of the prompt they belong to.

    Everything but `Postbox.slot` runs in the event loop.
    """

    def __init__(self) -> None:
        self._messages: list[tuple[int, Message]] = []
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, prompt: int, message: Message) -> None:
        """Add a message and wake whoever waits in `take`."""
        self._messages.append((prompt, message))
        self._wake()

    def fail(self, error: Exception) -> None:
        """Make `take` raise `error` once the messages that have come are taken."""
        if self._failure is None:
            self._failure = error
            self._wake()

    @property
    def failed(self) -> bool:
        """Whether `fail` was called."""
        return self._failure is not None

    async def take(self) -> list[tuple[int, Message]]:
        """All messages that have come, at least one; waits for it.

        Raises:
            whatever `fail` was given.
        """
        while not self._messages and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if not self._messages and self._failure is not None:
            raise self._failure
        messages, self._messages = self._messages, []
        return messages

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
