"""More adapters than fit: loading, evicting, refusing, and mixes that are compiled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.engine.adapters import Packed
from gossamer.engine.errors import AdapterTooLarge, DeviceFull
from gossamer.engine.memory import Memory
from gossamer.engine.residency import Residency, Resident
from gossamer.merge import BASE, Member, canonical
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import digest
from tests.engine.running import ask, generate, running, tokens_of
from tests.engine.six_adapters import (
    ADAPTERS,
    MIXES,
    NAMES,
    SETS,
    TABLE,
    TEXT,
    error_of,
    packed_bytes,
    request,
    wanted,
)
from tests.engine.test_mixes import random_adapter
from tests.tiny import tiny_model


def test_more_adapters_than_fit_are_loaded_and_evicted_and_stay_right() -> None:
    size = packed_bytes()
    with running(tiny_model("llama"), ADAPTERS, memory_bytes=int(size * 2.7), fuse=False) as engine:
        for turn in range(2):
            for i, mix in enumerate(MIXES):
                answer = ask(engine, request(f"{turn}-{i}", mix))[0]
                assert tokens_of(answer) == wanted(mix)
                assert len(engine.resident()) <= 2
        stats = engine.stats()
        assert stats.loads == 12
        assert stats.evictions >= 10
        assert stats.adapter_bytes + stats.kv_bytes <= stats.memory_bytes


def test_an_adapter_that_cannot_fit_is_refused_and_nothing_is_evicted() -> None:
    huge = random_adapter(TABLE, "element", 0.9, 0.1, 99)
    adapters = {**ADAPTERS, digest(huge): huge}
    size = packed_bytes()
    with running(tiny_model("llama"), adapters, memory_bytes=size * 3, fuse=False) as engine:
        ask(engine, request("a", MIXES[0]))
        before = engine.resident()
        big, small = ask(
            engine, request("huge", canonical([Member(digest(huge), 1.0)])), request("c", MIXES[0])
        )
        assert isinstance(error_of(big), AdapterTooLarge)
        assert tokens_of(small) == wanted(MIXES[0])
        assert engine.resident() == before


def test_adapters_that_do_not_fit_together_take_turns() -> None:
    size = packed_bytes()
    with running(
        tiny_model("llama"), ADAPTERS, memory_bytes=int(size * 1.8), fuse=False, loader_threads=2
    ) as engine:
        answers = ask(engine, *(request(f"r{i}", MIXES[i % 6]) for i in range(12)))
        assert engine.stats().loads <= 12
    for i, answer in enumerate(answers):
        assert tokens_of(answer) == wanted(MIXES[i % 6])


def test_a_mix_whose_members_do_not_fit_together_is_refused() -> None:
    size = packed_bytes()
    mix = canonical([Member(NAMES[0], 0.5), Member(NAMES[1], 0.5)])
    with running(tiny_model("llama"), ADAPTERS, memory_bytes=int(size * 1.8)) as engine:
        both, one = ask(engine, request("both", mix), request("one", MIXES[2]))
    assert isinstance(error_of(both), AdapterTooLarge)
    assert tokens_of(one) == wanted(MIXES[2])


def test_a_compiled_mix_equals_the_dense_formula() -> None:
    members = [Member(NAMES[i], w) for i, w in ((0, 1.0), (1, 0.8), (2, -0.5))]
    mix = canonical(members, "overlap_mean")
    model = tiny_model("llama")
    for name in TABLE:
        parts = [(m.weight, ADAPTERS[m.digest].deltas[name]) for m in mix.members]
        total = sum(w * d.dense().astype(np.float64) for w, d in parts)
        count = np.zeros(TABLE[name])
        for _, delta in parts:
            count.reshape(-1)[delta.positions] += 1
        model.get_parameter(name).data += torch.from_numpy(total / np.maximum(count, 1)).float()
    right = generate(model, TEXT, 20)
    with running(tiny_model("llama"), ADAPTERS) as engine:
        first, base, again = ask(engine, request("m", mix), request("b"), request("m2", mix))
    assert tokens_of(first) == tokens_of(again) == right
    assert tokens_of(base) == wanted(BASE)
    assert right != wanted(canonical(members))


def test_a_compiled_mix_without_overlap_survives_eviction_of_others() -> None:
    """Members with disjoint supports need no correction; the mix must stay known all the same."""
    half = [
        DeltaSet(
            "test",
            "test",
            {
                name: Delta.element(d.shape, d.positions[i::2], d.values_f32()[i::2] * 1.0)
                for name, d in SETS[0].deltas.items()
            },
        )
        for i in (0, 1)
    ]
    adapters = {**ADAPTERS, **{digest(h): h for h in half}}
    mix = canonical([Member(digest(h), 1.0) for h in half], "overlap_mean")
    size = packed_bytes()
    with running(tiny_model("llama"), adapters, memory_bytes=int(size * 3.2), fuse=False) as engine:
        answers = ask(engine, request("m", mix), *(request(f"r{i}", MIXES[i]) for i in range(6)))
        again = ask(engine, request("m2", mix))[0]
    assert tokens_of(answers[0]) == tokens_of(again) == wanted(MIXES[0])


class _Later(Executor):
    """Runs what was submitted when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.jobs.append(lambda: fn(*args, **kwargs))
        return Future()

    def run(self) -> None:
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            job()


class _NoRoom:
    """Memory of a device that is full, in spite of the budget."""

    tried = 0

    def move(self, moves: object) -> None:
        del moves

    def place(self, key: str, packed: Packed, run: object) -> Packed:
        del packed, run
        self.tried += 1
        raise DeviceFull(key, torch.OutOfMemoryError("full"))


@pytest.mark.parametrize("while_asked", [True, False])
@pytest.mark.parametrize("placing", [True, False])
def test_a_failure_is_told_once_whenever_it_comes(placing: bool, while_asked: bool) -> None:
    """Also between a request's question and the end of that schedule, which saw no failure yet."""
    later, device, read = _Later(), _NoRoom(), []
    memory: Memory[Resident] = Memory(64, 8, 1, framed=True)

    def pack(key: str, decode: Callable[[], DeltaSet]) -> Packed:
        read.append(key)
        if not placing:
            raise DeviceFull(key, torch.OutOfMemoryError("full"))
        del decode
        return Packed({}, buffer=torch.zeros(8, dtype=torch.uint8))

    residency = Residency(memory, ADAPTERS.__getitem__, pack, later, lambda: None, device)
    for attempt in (1, 2):  # the next request tries again
        assert not residency.ready(MIXES[0])
        if placing:
            later.run()
            residency.settle()
            assert not residency.ready(MIXES[0])
        if while_asked:
            later.run()
            residency.settle()
            assert residency.has_news
        else:
            residency.settle()
            later.run()
        with pytest.raises(DeviceFull):
            residency.ready(MIXES[0])
        with pytest.raises(DeviceFull):  # somebody else who waits for it
            residency.ready(MIXES[0])
        residency.settle()
        assert residency.idle
        assert memory.counts.load_failures == attempt == len(read)
        assert device.tried == (attempt if placing else 0)
