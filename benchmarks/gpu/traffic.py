"""Requests to a running engine: rates, first tokens of adapters that must be loaded, many adapters
of which few fit."""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.deltas import Kind
from benchmarks.gpu.inside import Inside, mix_of
from benchmarks.gpu.served import Seeded, adapter, engine_of, key_of
from gossamer.engine.client import Engine
from gossamer.engine.messages import Chunk, Done, Failed, Message, Request, Sampling
from gossamer.merge import BASE, Mix

#: First tokens of each kind.
_PAIRS = 5
#: Rows that decode beside the request whose first token is timed, of the most that run.
_BUSY = 0.5


@dataclass
class Answer:
    """The arrival of one request's tokens; noted in the engine's thread.

    Attributes:
        sent: when it was submitted.
        times: of its tokens.
    """

    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def take(self, message: Message) -> None:
        """The receiver of its messages."""
        if isinstance(message, Chunk) and message.token_ids:
            self.times += [time.perf_counter()] * len(message.token_ids)
        elif isinstance(message, Failed):
            self.error = message.error
        if isinstance(message, Done | Failed):
            self.ended.set()

    def first(self) -> float:
        """Waits for the end; milliseconds to the first token."""
        self.ended.wait()
        if self.error is not None:
            raise self.error
        return 1e3 * (self.times[0] - self.sent)


class Client:
    """Submits requests with prompts of their own."""

    def __init__(self, engine: Engine, prompt: int) -> None:
        self.engine = engine
        self._prompt = prompt
        self._numbers = itertools.count()

    def submit(self, mix: Mix, new_tokens: int, prompt: int | None = None) -> tuple[str, Answer]:
        """One request, greedy, to its last token."""
        number = next(self._numbers)
        words = (13 * number + 7 * np.arange(prompt or self._prompt)) % (self.engine.vocab_size - 2)
        sampling = Sampling(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        request = Request(f"bench-{number}", tuple((words + 2).tolist()), mix, sampling)
        answer = Answer(time.perf_counter())
        self.engine.submit(request, answer.take)
        return request.id, answer

    def rate(self, mixes: Sequence[Mix], rows: int, new_tokens: int) -> float:
        """Tokens a second of `rows` requests at once, prompts included."""
        start = time.perf_counter()
        answers = [self.submit(mixes[i % len(mixes)], new_tokens)[1] for i in range(rows)]
        for answer in answers:
            answer.first()
        return rows * new_tokens / (max(a.times[-1] for a in answers) - start)

    def first_token(self, mix: Mix) -> float:
        """Milliseconds."""
        return self.submit(mix, 1)[1].first()

    @contextmanager
    def busy(self, rows: int, new_tokens: int) -> Iterator[None]:
        """That many base rows decode meanwhile."""
        sent = [self.submit(BASE, new_tokens) for _ in range(rows)]
        while not all(answer.times or answer.ended.is_set() for _, answer in sent):
            time.sleep(1e-3)
        try:
            yield
        finally:
            for name, answer in sent:
                self.engine.cancel(name)
                answer.ended.wait()


def traffic(bench: Bench) -> None:
    """Rates before and after adapters came in, with adapters, and first tokens."""
    setting, model = bench.setting, bench.setting.model
    source = Seeded(model, setting.step_densities[1])
    with engine_of(bench, model, source=source) as engine:
        inside = Inside(engine)
        kind = Kind(setting.step_densities[1], setting.coding)
        pairs = min(_PAIRS, setting.repetitions)
        keys = [key_of("traffic", i) for i in range(64 + pairs)]
        nbytes = inside.keep(keys, adapter(bench, inside, model, kind))
        engine.start()
        client = Client(engine, setting.prompt)
        _rates(bench, client, keys, inside.room // (nbytes + inside.page_bytes))
        _first_tokens(bench, client, keys[64:], [source.register(i) for i in range(pairs)])


def _rates(bench: Bench, client: Client, keys: Sequence[str], fitting: int) -> None:
    setting = bench.setting
    few = [mix_of(key) for key in keys[: min(8, fitting)]]
    many = [mix_of(key) for key in keys[: min(64, fitting)]]

    def rate(what: str, mixes: Sequence[Mix], rows: int, adapters: int, against: float) -> float:
        client.rate(mixes, rows, 2)  # captures, loads
        found = [client.rate(mixes, rows, setting.new_tokens) for _ in range(setting.rounds)]
        value = statistics.median(found)
        note = f"{value / against:.3f} of base-only" if against else "prompts included"
        bench.record.add(
            "traffic", what, value, "tok/s", model=setting.model.name, rows=rows,
            adapters=adapters, density=setting.step_densities[1] if adapters else 0.0,
            coding=setting.coding if adapters else "", note=note,
        )  # fmt: skip
        return value

    before = {rows: rate("base only, no adapter yet", [BASE], rows, 0, 0.0)
              for rows in setting.rows}  # fmt: skip
    for rows in setting.rows:
        for mixes in (few, many) if rows > len(few) else (few,):
            rate("adapters in the rows", mixes, rows, min(len(mixes), rows), before[rows])
    for rows in setting.rows:
        rate("base only, adapters in memory", [BASE], rows, 0, before[rows])


def _first_tokens(bench: Bench, client: Client, kept: Sequence[str], made: Sequence[str]) -> None:
    """Beside rows that decode: an adapter in memory, one in the host's tier, one to be packed."""
    setting = bench.setting
    rows = max(int(_BUSY * setting.rows[0]), 1)
    found: dict[str, list[float]] = {"in memory": [], "on the host": [], "to be packed": []}
    with client.busy(rows, setting.busy_tokens):
        client.first_token(BASE)
        for there, away in bench.cases(zip(kept, made, strict=True)):
            found["on the host"].append(client.first_token(mix_of(there)))
            found["in memory"].append(client.first_token(mix_of(there)))
            found["to be packed"].append(client.first_token(mix_of(away)))
    warm = statistics.median(found["in memory"])
    for what, times in found.items():
        value = statistics.median(times)
        bench.record.add(
            "ttft", what, value, "ms", model=setting.model.name, rows=rows, adapters=1,
            density=setting.step_densities[1], coding=setting.coding,
            note=f"{value / warm:.2f} of in memory; {rows} base rows decoding",
        )  # fmt: skip


def zipf(bench: Bench) -> None:
    """Many registered adapters, room for few, requests by Zipf's law (s = 1)."""
    setting, model = bench.setting, bench.setting.model
    density = setting.step_densities[0]
    source = Seeded(model, density)
    keys = [source.register(seed) for seed in range(setting.registered)]
    layer = [bench.deltas.host(weight, Kind(density, setting.coding)) for weight in model.weights]
    nbytes = model.layers * sum(delta.data.nbytes for delta in layer)
    rows = setting.rows[0]
    page = model.layers * model.kv_heads * model.head_size * 2 * 16 * setting.dtype.itemsize
    pages = rows * (2 + (setting.prompt + setting.new_tokens) // 16)
    room = setting.room * math.ceil(1.02 * nbytes / page) + pages
    with engine_of(bench, model, source=source, memory_bytes=room * page, max_rows=rows) as engine:
        engine.start()
        _popular(bench, Client(engine, setting.prompt), keys, rows)


def _popular(bench: Bench, client: Client, keys: Sequence[str], rows: int) -> None:
    """So many requests in flight at any time."""
    setting = bench.setting
    shares = 1 / np.arange(1, len(keys) + 1)
    drawn = np.random.default_rng(0).choice(len(keys), setting.requests, p=shares / shares.sum())
    flying: list[Answer] = []
    found: dict[bool, list[Answer]] = {True: [], False: []}
    start = time.perf_counter()
    for index in bench.cases(drawn.tolist()):
        while len(flying) >= rows:
            flying = [answer for answer in flying if not answer.ended.is_set()]
            time.sleep(1e-4)
        is_there = keys[index] in client.engine.resident()
        answer = client.submit(mix_of(keys[index]), setting.new_tokens)[1]
        flying.append(answer)
        found[is_there].append(answer)
    times = {there: [answer.first() for answer in some] for there, some in found.items()}
    seconds = time.perf_counter() - start
    stats, done = client.engine.stats(), sum(map(len, times.values()))
    figures = {
        "tokens": (done * setting.new_tokens / seconds, "tok/s"),
        "requests that found their adapter": (len(times[True]) / max(done, 1), "share"),
        "evictions": (stats.evictions, "adapters"),
    }
    for there, name in ((True, "in memory"), (False, "not in memory")):
        if times[there]:
            figures[f"first token, {name}"] = (statistics.median(times[there]), "ms")
    for what, (value, unit) in figures.items():
        bench.record.add(
            "zipf", what, value, unit, model=setting.model.name, rows=rows, adapters=len(keys),
            density=setting.step_densities[0], coding=setting.coding,
            note=f"{done} requests, room for {setting.room}",
        )  # fmt: skip
