"""Threads for what blocks: the catalog and its files. Each kind has a few of its own, so that one
cannot keep the others waiting."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import ParamSpec, TypeVar

import anyio

P = ParamSpec("P")
R = TypeVar("R")

_QUERIES = 8
_FILES = 4
#: one has a version and a parent of it decoded: gigabytes, and seconds
_INCREMENTS = 1
#: as above, of an adapter and of the files that it is made of
_CONVERSIONS = 1


class Workers:
    """Run blocking calls beside the event loop."""

    def __init__(self) -> None:
        self._queries = anyio.CapacityLimiter(_QUERIES)
        self._files = anyio.CapacityLimiter(_FILES)
        self._increments = anyio.CapacityLimiter(_INCREMENTS)
        self._conversions = anyio.CapacityLimiter(_CONVERSIONS)
        self._turns = anyio.CapacityLimiter(_CONVERSIONS)

    async def query(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Something short: a look into the registry."""
        run = partial(call, *args, **kwargs)
        return await anyio.to_thread.run_sync(run, limiter=self._queries)

    async def file(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Something that reads, writes or checks an adapter file."""
        run = partial(call, *args, **kwargs)
        return await anyio.to_thread.run_sync(run, limiter=self._files)

    async def increment(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The making of an increment. One at a time; what waits has no thread."""
        run = partial(call, *args, **kwargs)
        return await anyio.to_thread.run_sync(run, limiter=self._increments)

    async def conversion(
        self,
        begin: Callable[[], Awaitable[None]],
        call: Callable[P, R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """The conversion of an upload. One at a time; what waits keeps its place among uploads.

        Args:
            begin: called when its turn has come; what it raises ends the turn.
        """
        run = partial(call, *args, **kwargs)
        async with self._turns:
            await begin()
            return await anyio.to_thread.run_sync(run, limiter=self._conversions)
