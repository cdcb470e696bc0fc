"""More requests than the server can do: the excess is refused at once, the others are served."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.api.running import Running, running

ROWS, QUEUED = 4, 8
BODY = {"model": "base", "prompt": "x", "max_tokens": 60, "stream": True, "ignore_eos": True}


@dataclass(frozen=True)
class Answer:
    status: int
    first: float  # seconds to the first byte of the body
    whole: float
    headers: httpx.Headers


@pytest.fixture(scope="module")
def small(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Four rows, and eight sequences may wait."""
    limits = {"queued": QUEUED, "queued_per_tenant": QUEUED}
    with running(api_base, tmp_path_factory.mktemp("overload"), limits, max_rows=ROWS) as server:
        yield server


async def one(http: httpx.AsyncClient) -> Answer:
    start = time.perf_counter()
    async with http.stream("POST", "/v1/completions", json=BODY) as reply:
        first = 0.0
        async for _ in reply.aiter_bytes():
            first = first or time.perf_counter() - start
    return Answer(reply.status_code, first, time.perf_counter() - start, reply.headers)


async def open_loop(server: Running, rate: float, seconds: float) -> list[Answer]:
    """Requests at a fixed rate, whether earlier ones have been answered or not."""
    headers = {"authorization": f"Bearer {server.key}"}
    limits = httpx.Limits(max_connections=500)
    async with httpx.AsyncClient(
        base_url=server.url, headers=headers, timeout=60, limits=limits
    ) as http:
        tasks = []
        for _ in range(int(rate * seconds)):
            tasks.append(asyncio.create_task(one(http)))
            await asyncio.sleep(1 / rate)
        return await asyncio.gather(*tasks)


async def capacity(server: Running) -> float:
    """Requests a second that the server does when its rows are full."""
    headers = {"authorization": f"Bearer {server.key}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as http:
        start = time.perf_counter()
        answers = await asyncio.gather(*(one(http) for _ in range(ROWS + QUEUED)))
    assert {answer.status for answer in answers} == {200}
    return len(answers) / (time.perf_counter() - start)


def check(server: Running, seconds: float) -> None:
    rate = asyncio.run(capacity(server))
    answers = asyncio.run(open_loop(server, 3 * rate, seconds))
    served = [a for a in answers if a.status == 200]
    refused = [a for a in answers if a.status != 200]
    assert served
    assert refused
    assert {a.status for a in refused} <= {429, 503}
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert int(answer.headers["retry-after-ms"]) >= 1
    # The clients share the machine's two cores with the server, hence the median.
    assert statistics.median(a.whole for a in refused) < 0.1
    # Who is let in waits for at most what is queued before it.
    worst = sorted(a.first for a in served)[int(0.99 * (len(served) - 1))]
    assert worst < 3 * (ROWS + QUEUED) / rate + 1.0
    assert server.services.admission.inside == 0


def test_three_times_the_capacity_for_a_moment(small: Running) -> None:
    check(small, 3.0)


@pytest.mark.gate
def test_three_times_the_capacity_for_a_minute(small: Running) -> None:
    check(small, 60.0)
