"""The load generator behind `gossamer bench`: streamed completions, timed one by one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import httpx


@dataclass(frozen=True)
class Ask:
    """One completion to ask for."""

    model: str
    prompt: str


@dataclass(eq=False)
class Timing:
    """How one completion went. Seconds.

    Attributes:
        first: from the request to its first text.
        gaps: between pieces of text that follow each other.
        tokens: that the server counted.
        error: why it failed; None when it was answered.
    """

    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """What a workload took: `seconds` from the first request to the end of the last answer."""

    seconds: float
    timings: Sequence[Timing]

    @property
    def tokens(self) -> int:
        """That were generated."""
        return sum(timing.tokens for timing in self.timings)

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run."""
        return self.tokens / self.seconds

    @property
    def errors(self) -> list[str]:
        """Of the completions that failed."""
        return [timing.error for timing in self.timings if timing.error is not None]

    def firsts(self) -> Iterator[float]:
        """Times to the first token."""
        return (timing.first for timing in self.timings if timing.first is not None)

    def gaps(self) -> Iterator[float]:
        """Times between tokens, of all completions."""
        return (gap for timing in self.timings for gap in timing.gaps)


def run(url: str, key: str, asks: Sequence[Ask], *, concurrency: int, max_tokens: int) -> Run:
    """Ask for all completions, `concurrency` at a time, greedily, of exactly `max_tokens`."""
    return asyncio.run(_run(url, key, asks, concurrency, max_tokens))


async def _run(url: str, key: str, asks: Sequence[Ask], concurrency: int, most: int) -> Run:
    left = iter(asks)
    timings: list[Timing] = []
    async with httpx.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(600.0, connect=10.0),
        limits=httpx.Limits(max_connections=concurrency),
        trust_env=False,
    ) as client:

        async def work() -> None:
            # closed loop: each of them asks again as soon as it was answered
            for ask in left:
                timings.append(await _complete(client, ask, most))  # noqa: PERF401 - one at a time

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        seconds = time.perf_counter() - began
    return Run(seconds, timings)


async def _complete(client: httpx.AsyncClient, ask: Ask, most: int) -> Timing:
    timing = Timing()
    body = {
        "model": ask.model,
        "prompt": ask.prompt,
        "max_tokens": most,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    moments: list[float] = []
    try:
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.is_error:
                timing.error = _message(await reply.aread(), reply.status_code)
                return timing
            async for line in reply.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                event = json.loads(line.removeprefix("data:"))
                if "error" in event:
                    timing.error = str(event["error"].get("message"))
                elif event.get("usage"):
                    timing.tokens = event["usage"]["completion_tokens"]
                if event.get("choices") and event["choices"][0].get("finish_reason") is None:
                    moments.append(time.perf_counter())
    except (httpx.HTTPError, ValueError, KeyError) as error:
        timing.error = str(error) or type(error).__name__
    if moments:
        timing.first = moments[0] - began
        timing.gaps = [after - before for before, after in pairwise(moments)]
    return timing


def _message(content: bytes, status: int) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value at `share` (0 to 1) of the sorted values, interpolated; None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
