"""One engine in this process, and the job that is run on it again and again."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.common import Meter
from benchmarks.serving.adapters import Library, Target
from benchmarks.serving.prompts import job_prompts
from gossamer.base.load import BaseFiles, load_model, load_tokenizer
from gossamer.base.patch_map import adapter_table
from gossamer.engine.client import Engine
from gossamer.engine.config import EngineConfig
from gossamer.engine.messages import Chunk, Done, Failed, Message, Request, Sampling
from gossamer.merge import BASE, Mix
from gossamer.store.delta import DeltaSet

NEW_TOKENS = 64
GREEDY = Sampling(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True)
class Timing:
    """One run of the job.

    Attributes:
        seconds: from the first submission to the last token, prefill included.
        rate: new tokens per second over that time.
        step: median seconds between two tokens of a row while every row was decoding.
        fused: share of the steps that ran on fused weights.
        foreign: share of the machine that other processes used meanwhile.
    """

    seconds: float
    rate: float
    step: float
    fused: float
    foreign: float


@dataclass
class _Row:
    """The arrival of one request's tokens, noted in the engine's thread."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def take(self, message: Message) -> None:
        if isinstance(message, Chunk) and message.token_ids:
            self.times.append(time.perf_counter())
            self.tokens += message.token_ids
        elif isinstance(message, Failed):
            self.error = message.error
        if isinstance(message, Done | Failed):
            self.ended.set()

    def wait(self) -> None:
        self.ended.wait()
        if self.error is not None:
            raise self.error


class Bench:
    """An engine with its base, its random adapters and the job's prompts.

    Attributes:
        library: makes adapters; the engine's source of those it made.
        elsewhere: the source of all other adapters.
        base_bytes: of the weights that a decode step reads: every product, and the output head.
    """

    elsewhere: Callable[[str], DeltaSet] | None = None

    def __init__(self, base: BaseFiles, *, memory_bytes: int = 4 << 30) -> None:
        model = load_model(base)
        self.base = base
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(base)
        self.prompts = job_prompts(self.tokenizer)
        table = adapter_table(model)
        deviations = {name: float(model.get_parameter(name).std()) for name in table}
        self.library = Library(Target(base.fingerprint, base.name, table, deviations))
        head = model.get_output_embeddings().weight
        weights = sum(rows * columns for rows, columns in table.values()) + head.numel()
        self.base_bytes = weights * head.element_size()
        config = EngineConfig(
            max_rows=len(self.prompts),
            memory_bytes=memory_bytes,
            queue_timeout=600.0,  # a first load waits for the making of a random adapter
        )
        self.engine = Engine(
            model, self.tokenizer, self._open, config, fingerprint=base.fingerprint
        )
        self._numbers = count()
        self.engine.start()

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def _open(self, name: str) -> DeltaSet:
        if self.elsewhere is not None and not self.library.knows(name):
            return self.elsewhere(name)
        return self.library.open(name)

    def job(self, mixes: Sequence[Mix] = (), new_tokens: int = NEW_TOKENS) -> Timing:
        """Continue all prompts at once; row i uses mix i mod their number."""
        before = self.engine.stats()
        with Meter() as meter:
            rows = self._run(mixes or (BASE,), new_tokens)
        after = self.engine.stats()
        wrong = [i for i, row in enumerate(rows) if len(row.tokens) != new_tokens]
        if wrong:
            raise RuntimeError(f"rows {wrong} do not have {new_tokens} tokens")
        steps = after.steps - before.steps
        return Timing(
            seconds=meter.seconds,
            rate=len(rows) * new_tokens / meter.seconds,
            step=_step([row.times for row in rows]),
            fused=(after.fused_steps - before.fused_steps) / steps,
            foreign=meter.foreign,
        )

    def first_token(self, prompt: Sequence[int], mix: Mix = BASE) -> float:
        """Seconds from the submission of a request to its first token."""
        row = _Row()
        request = self._request(prompt, mix, Sampling(max_tokens=1, temperature=0.0))
        start = time.perf_counter()
        self.engine.submit(request, row.take)
        row.wait()
        return row.times[0] - start

    @contextmanager
    def load(self, rows: int) -> Iterator[None]:
        """That many base rows decode all the time, each followed by another when it ends."""
        stopping = threading.Event()
        sampling = Sampling(max_tokens=512, temperature=0.0, ignore_eos=True)

        def keep_going(prompt: list[int]) -> None:
            while not stopping.is_set():
                row, request = _Row(), self._request(prompt, BASE, sampling)
                self.engine.submit(request, row.take)
                while not row.ended.wait(0.05):
                    if stopping.is_set():
                        self.engine.cancel(request.id)

        threads = [
            threading.Thread(target=keep_going, args=(prompt,)) for prompt in self.prompts[:rows]
        ]
        for thread in threads:
            thread.start()
        try:
            time.sleep(1.0)  # until the prompts are in
            yield
        finally:
            stopping.set()
            for thread in threads:
                thread.join()

    def _run(self, mixes: Sequence[Mix], new_tokens: int) -> list[_Row]:
        sampling = Sampling(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        # A salt of its own: no run finds the prompt's keys and values of the run before.
        salt = f"run {next(self._numbers)}".encode()
        rows = [_Row() for _ in self.prompts]
        for i, (row, prompt) in enumerate(zip(rows, self.prompts, strict=True)):
            request = self._request(prompt, mixes[i % len(mixes)], sampling, salt)
            self.engine.submit(request, row.take)
        for row in rows:
            row.wait()
        return rows

    def _request(
        self, prompt: Sequence[int], mix: Mix, sampling: Sampling, salt: bytes | None = None
    ) -> Request:
        number = next(self._numbers)
        return Request(
            id=f"bench-{number}",
            prompt=tuple(prompt),
            mix=mix,
            sampling=sampling,
            salt=f"request {number}".encode() if salt is None else salt,
        )


def _step(arrivals: Sequence[Sequence[float]]) -> float:
    """Median time between tokens while all rows were decoding."""
    start = max(times[0] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    gaps = [b - a for times in arrivals for a, b in pairwise(times) if a >= start and b <= end]
    return statistics.median(gaps) if gaps else float("nan")


def read_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes per second at which all threads together read memory that no cache holds."""
    data = torch.ones(nbytes // 4)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return nbytes / best
