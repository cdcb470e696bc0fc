"""The six workloads as seeded generators. A trace is a function of its name."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from benchmarks.traces.trace import Ask, Change, Event, Head

#: Requests of a trace, and their mean rate: one row of a 135M model on two cores takes 5 s.
REQUESTS = 200
RATE = 2.0
#: Members of a merge in W-D; bursts of W-A; the flood of W-E.
MEMBERS = (2, 8)
BURST = 16
FLOOD = 10
#: s of the Zipf law, where popularity is not uniform.
ZIPF = 1.0


@dataclass(frozen=True)
class Trace:
    """A head and the events behind it."""

    head: Head
    events: list[Event]


def _lengths(rng: np.random.Generator) -> tuple[int, int]:
    """Prompt and answer, both uniform over [8, 512)."""
    prompt, new = rng.integers(8, 512, 2)
    return int(prompt), int(new)


def _poisson(rng: np.random.Generator) -> Iterator[float]:
    """Arrival times with exponential gaps."""
    now = 0.0
    while True:
        now += rng.exponential(1 / RATE)
        yield now


def _bursts(rng: np.random.Generator) -> Iterator[float]:
    """The same mean rate in bursts of 16 that arrive within a tenth of a second."""
    start = 0.0
    while True:
        start += rng.exponential(BURST / RATE)
        yield from start + np.sort(rng.uniform(0, 0.1, BURST))


def _uniform(rng: np.random.Generator, adapters: int) -> int:
    return int(rng.integers(adapters))


def _zipf(rng: np.random.Generator, adapters: int) -> int:
    """Adapter k with probability proportional to 1 / (k + 1)^s."""
    weights = 1 / np.arange(1, adapters + 1) ** ZIPF
    return int(rng.choice(adapters, p=weights / weights.sum()))


Arrivals = Callable[[np.random.Generator], Iterator[float]]
Popularity = Callable[[np.random.Generator, int], int]


def _requests(
    rng: np.random.Generator,
    adapters: int,
    arrivals: Arrivals = _poisson,
    popularity: Popularity = _zipf,
) -> list[Ask]:
    """`REQUESTS` requests, each for an adapter of a tenant of its own; for the base with none."""
    asks = []
    for at, _ in zip(arrivals(rng), range(REQUESTS), strict=False):
        name = f"a{popularity(rng, adapters)}" if adapters else "base"
        asks.append(Ask(round(float(at), 3), f"tenant-{name}", name, *_lengths(rng)))
    return asks


def _finish(head: Head, events: list[Event]) -> Trace:
    events = sorted(events, key=lambda event: event.at)
    asks = [event for event in events if isinstance(event, Ask)]
    return Trace(replace(head, rate=round(len(asks) / events[-1].at, 2)), events)


def _plain(
    name: str, about: str, adapters: int, arrivals: Arrivals, popularity: Popularity
) -> Trace:
    rng, head = _start(name, about, adapters)
    return _finish(head, list(_requests(rng, adapters, arrivals, popularity)))


def _overflow(name: str) -> Trace:
    rng, head = _start(name, "Twice as many adapters as the memory budget holds.", 128)
    return _finish(replace(head, fit=64), list(_requests(rng, 128, popularity=_uniform)))


def _half_base(name: str) -> Trace:
    rng, head = _start(name, "Half of the requests go to the base.", 64)
    asks = [
        replace(ask, model="base", tenant="tenant-base") if rng.random() < 0.5 else ask
        for ask in _requests(rng, 64)
    ]
    return _finish(head, list(asks))


def _merges(name: str) -> Trace:
    rng, head = _start(name, "A quarter are merges of 2 to 8 adapters, none asked for twice.", 64)
    seen: set[str] = set()
    asks = []
    for ask in _requests(rng, 64):
        if rng.random() < 0.25:
            ask = replace(ask, model=_fresh_mix(rng, 64, seen))
        asks.append(ask)
    return _finish(head, list(asks))


def _fresh_mix(rng: np.random.Generator, adapters: int, seen: set[str]) -> str:
    while True:
        count = int(rng.integers(MEMBERS[0], MEMBERS[1] + 1))
        members = sorted(rng.choice(adapters, count, replace=False).tolist())
        weights = rng.uniform(0.1, 1.0, count)
        mix = "+".join(f"a{a}*{w:.2f}" for a, w in zip(members, weights, strict=True))
        if mix not in seen:
            seen.add(mix)
            return mix


def _flood(name: str) -> Trace:
    rng, head = _start(name, "In the middle third one tenant asks ten times as often.", 16)
    asks = _requests(rng, 16, popularity=_uniform)
    start, end = asks[-1].at / 3, 2 * asks[-1].at / 3
    middle = [ask for ask in asks if start <= ask.at < end]
    loud = middle[0].tenant
    extra = []
    for ask in middle:
        if ask.tenant == loud:
            for _ in range(FLOOD - 1):
                at = round(float(rng.uniform(start, end)), 3)
                extra.append(Ask(at, loud, ask.model, *_lengths(rng)))
    return _finish(head, [*asks, *extra])


def _churn(name: str) -> Trace:
    rng, head = _start(name, "Adapters are uploaded again, unloaded, rolled back under load.", 32)
    events: list[Event] = list(_requests(rng, 32))
    end = events[-1].at
    uploaded: set[str] = set()
    for at in np.sort(rng.uniform(0, end, REQUESTS // 4)):
        model = f"a{_zipf(rng, 32)}"
        kind = rng.random()
        if kind < 0.5:
            uploaded.add(model)
            events.append(Change(round(float(at), 3), "upload", model))
        elif kind < 0.75 or model not in uploaded:
            events.append(Change(round(float(at), 3), "unload", model))
        else:
            uploaded.discard(model)
            events.append(Change(round(float(at), 3), "rollback", model))
    return _finish(head, events)


def _start(name: str, about: str, adapters: int) -> tuple[np.random.Generator, Head]:
    seed = zlib.crc32(name.encode())
    return np.random.default_rng(seed), Head(name, about, seed, adapters, RATE)


def _w_a() -> dict[str, Callable[[], Trace]]:
    """0, 1, 5, 64 and 1000 adapters; Poisson and bursts; uniform and Zipf from two adapters on."""
    found: dict[str, Callable[[], Trace]] = {}
    for pattern, arrivals in (("poisson", _poisson), ("bursts", _bursts)):
        for adapters in (0, 1, 5, 64, 1000):
            laws = {"uniform": _uniform, "zipf": _zipf} if adapters > 1 else {"": _uniform}
            for law, popularity in laws.items():
                name = "-".join(filter(None, ["W-A", pattern, str(adapters), law]))
                popular = f", {law} popularity" if law else ""
                about = f"{adapters} adapters, {pattern} arrivals{popular}."
                found[name] = partial(_plain, name, about, adapters, arrivals, popularity)
    return found


#: Every trace by its name.
TRACES: dict[str, Callable[[], Trace]] = {
    **_w_a(),
    "W-B-overflow": partial(_overflow, "W-B-overflow"),
    "W-C-half-base": partial(_half_base, "W-C-half-base"),
    "W-D-merges": partial(_merges, "W-D-merges"),
    "W-E-flood": partial(_flood, "W-E-flood"),
    "W-F-churn": partial(_churn, "W-F-churn"),
}
