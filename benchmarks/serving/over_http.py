"""The base-only job through the server, against the same job on an engine in this process."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.common import ROOT, Meter
from benchmarks.serving.engine import NEW_TOKENS, Bench
from benchmarks.serving.figures import Figure, Goal, Sample

GROUP = "Over HTTP, 16 requests at once"
_DONE = "data: [DONE]"


class Endpoint:
    """A server in a process of its own; each run of the job uses another of its tenants."""

    def __init__(self, url: str, model: str, keys: list[str]) -> None:
        self._url = url
        self._model = model
        self._keys = iter(keys)

    def job(self, prompts: list[list[int]], *, stream: bool) -> Meter:
        """All prompts at once, each by `NEW_TOKENS` tokens."""
        key = next(self._keys)
        with Meter() as meter:
            asyncio.run(self._all(prompts, key, stream=stream))
        return meter

    async def _all(self, prompts: list[list[int]], key: str, *, stream: bool) -> None:
        async with httpx.AsyncClient(
            base_url=self._url, headers={"authorization": f"Bearer {key}"}, timeout=600
        ) as client:
            await asyncio.gather(*(self._one(client, prompt, stream) for prompt in prompts))

    async def _one(self, client: httpx.AsyncClient, prompt: list[int], stream: bool) -> None:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        if not stream:
            reply = await client.post("/v1/completions", json=body)
            tokens = reply.raise_for_status().json()["usage"]["completion_tokens"]
        else:
            body["stream_options"] = {"include_usage": True}
            tokens = await self._streamed(client, body)
        if tokens != NEW_TOKENS:
            raise RuntimeError(f"a completion has {tokens} tokens, not {NEW_TOKENS}")

    async def _streamed(self, client: httpx.AsyncClient, body: dict[str, object]) -> int:
        tokens = 0
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if line.startswith("data: ") and line != _DONE:
                    usage = json.loads(line[6:]).get("usage")
                    tokens = usage["completion_tokens"] if usage else tokens
        return tokens


@contextmanager
def endpoint(base: Path, runs: int) -> Iterator[Endpoint]:
    """Start a server on a free port over a new, empty store; stop it at the end."""
    with tempfile.TemporaryDirectory(prefix="gossamer-bench-") as data:
        command = [sys.executable, "-m", "benchmarks.serving.http_server", data, str(base)]
        process = subprocess.Popen(
            [*command, str(runs)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server ended with status {process.wait()}")
            yield Endpoint(**json.loads(line))
        finally:
            process.terminate()
            process.wait(60)


class OverHttp:
    """Whole answers and streams."""

    def __init__(self, bench: Bench, server: Endpoint) -> None:
        self._bench = bench
        self._server = server
        goal = Goal(">=", 0.95)
        self.whole = Figure(GROUP, "base only, whole answers", "tok/s", "in-process", goal=goal)
        self.streamed = Figure(GROUP, "base only, streamed", "tok/s", "in-process", goal=goal)

    def warm_up(self) -> None:
        """A run of each kind, for what the server pays once."""
        for stream in (True, False):
            self._server.job(self._bench.prompts, stream=stream)

    def run_round(self) -> None:
        """Whole answers and streams in turn, each between two runs in this process."""
        before = self._bench.job()
        for figure, stream in ((self.whole, False), (self.streamed, True)) * self.PAIRS:
            meter = self._server.job(self._bench.prompts, stream=stream)
            after = self._bench.job()
            rate = len(self._bench.prompts) * NEW_TOKENS / meter.seconds
            ours = statistics.fmean([before.rate, after.rate])
            figure.samples.append(Sample(rate, rate / ours, meter.foreign))
            before = after

    #: Of runs in a round. One is not enough: two runs of 3 s differ by a tenth on a shared host.
    PAIRS = 3
    #: Runs of the job that a server must have tenants for.
    RUNS_A_ROUND = 2 * PAIRS
    WARM_UP_RUNS = 2
