"""Who runs when: budgets, joins, waits, preemption. No tensors."""

from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.config import EngineConfig
from gossamer.engine.errors import AdapterUnavailable, EngineError
from gossamer.engine.memory import Memory
from gossamer.engine.messages import Request, Sampling
from gossamer.engine.scheduler import Scheduler, Work
from gossamer.engine.sequence import Phase, Sequence
from gossamer.merge import BASE, Member, Mix, canonical

SIZE = 4


class Gate:
    """Adapters that are there, missing or broken, by digest."""

    def __init__(self) -> None:
        self.absent: set[str] = set()
        self.broken: set[str] = set()
        self.pins: dict[str, int] = {}
        self.kept: dict[str, set[str]] = {}

    def ready(self, mix: Mix, keep: Collection[str]) -> bool:
        self.kept[mix.digest] = set(keep)
        for member in mix.members:
            if member.digest in self.broken:
                raise AdapterUnavailable(member.digest, ValueError("broken"))
        return not any(m.digest in self.absent for m in mix.members)

    def wanted(self, mix: Mix) -> list[str]:
        return [m.digest for m in mix.members]

    def pin(self, mix: Mix) -> None:
        self.pins[mix.digest] = self.pins.get(mix.digest, 0) + 1

    def unpin(self, mix: Mix) -> None:
        self.pins[mix.digest] -= 1


class House:
    """A scheduler with the rest of the engine played by hand."""

    def __init__(self, pages: int = 64, **config: int) -> None:
        self.gate = Gate()
        self.memory: Memory[object] = Memory(pages * 10, 10, SIZE)
        settings_ = {"max_rows": 4, "max_step_tokens": 32, "max_mixed_step_tokens": 16} | config
        self.scheduler = Scheduler(
            EngineConfig(page_size=SIZE, **settings_),  # type: ignore[arg-type]
            self.memory,
            self.gate,
        )
        self.count = 0

    def add(
        self,
        prompt: int | list[int],
        max_tokens: int = 8,
        mix: Mix = BASE,
        priority: int = 0,
        root: bytes | None = None,
        leader: Sequence | None = None,
        index: int = 0,
    ) -> Sequence:
        self.count += 1
        tokens = [self.count] * prompt if isinstance(prompt, int) else prompt
        request = Request(
            str(self.count), tuple(tokens), mix, Sampling(max_tokens=max_tokens), priority=priority
        )
        sequence = Sequence(request, index, root, 0.0, leader)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> tuple[list[Work], list[tuple[Sequence, EngineError]]]:
        work, failed = self.scheduler.schedule()
        self.memory.check_integrity()
        for w in work:
            assert w.start == w.sequence.computed
            assert len(w.sequence.pages) * SIZE >= w.start + w.count
            advance(self.memory, self.scheduler, w)
        return work, failed


def advance(memory: Memory[object], scheduler: Scheduler, work: Work) -> None:
    """What a step does to a sequence: one that draws has another token, and may be at its end."""
    draws = work.draws
    work.sequence.advance(memory, work.count)
    if draws:
        work.sequence.tokens.append(0)
        if work.sequence.remaining <= 0:
            scheduler.finish(work.sequence)


def mix(name: str) -> Mix:
    return canonical([Member("sha256:" + name * 64, 1.0)])


def shares(work: list[Work]) -> list[tuple[Sequence, int]]:
    return [(w.sequence, w.count) for w in work]


def test_a_long_prompt_is_cut_and_does_not_stall_the_decoding() -> None:
    house = House()
    short = house.add(3)
    house.step()
    long = house.add(40)
    work, _ = house.step()
    assert shares(work) == [(short, 1), (long, 16)]
    work, _ = house.step()
    assert shares(work) == [(short, 1), (long, 16)]
    work, _ = house.step()
    assert shares(work) == [(short, 1), (long, 8)]
    assert long.output_length == 1
    work, _ = house.step()
    assert shares(work) == [(short, 1), (long, 1)]


def test_nothing_decodes_so_the_whole_budget_goes_to_prompts() -> None:
    house = House()
    first, second = house.add(20), house.add(20)
    assert shares(house.step()[0]) == [(first, 20), (second, 12)]


def test_rows_are_limited_and_join_when_one_leaves() -> None:
    house = House(max_rows=2)
    first, second, third = (house.add(2, max_tokens=n) for n in (1, 3, 3))
    assert shares(house.step()[0]) == [(first, 2), (second, 2)]
    assert first.phase is Phase.ENDED
    assert shares(house.step()[0]) == [(second, 1), (third, 2)]


def test_a_request_that_waits_for_its_adapter_blocks_nobody() -> None:
    house = House()
    house.gate.absent.add("sha256:" + "a" * 64)
    slow, quick = house.add(4, mix=mix("a")), house.add(4)
    assert shares(house.step()[0]) == [(quick, 4)]
    house.gate.absent.clear()
    work, _ = house.step()
    assert shares(work) == [(quick, 1), (slow, 4)]
    assert house.gate.pins[mix("a").digest] == 1
    house.scheduler.finish(slow)
    assert house.gate.pins[mix("a").digest] == 0


def test_a_broken_adapter_fails_its_requests_only() -> None:
    house = House()
    house.gate.broken.add("sha256:" + "a" * 64)
    bad, good = house.add(4, mix=mix("a")), house.add(4)
    work, failed = house.step()
    assert shares(work) == [(good, 4)]
    assert [(s, type(e)) for s, e in failed] == [(bad, AdapterUnavailable)]
    assert bad not in house.scheduler.waiting


def test_priority_goes_before_arrival() -> None:
    house = House(max_rows=1)
    later, first, middle = house.add(2, priority=5), house.add(2, priority=-1), house.add(2)
    assert list(house.scheduler.waiting) == [first, middle, later]


def test_equal_prompts_share_pages_of_the_same_root_only() -> None:
    house = House()
    tokens = list(range(10))
    house.add(tokens, root=b"r")
    house.step()
    same, other = house.add(tokens, root=b"r"), house.add(tokens, root=b"s")
    work, _ = house.step()
    assert shares(work)[1:] == [(same, 2), (other, 10)]
    assert same.cached_tokens == 8
    assert other.cached_tokens == 0


def test_the_other_choices_wait_for_the_leaders_prompt_and_find_it() -> None:
    house = House(max_step_tokens=6, max_mixed_step_tokens=6)
    tokens = list(range(10))
    leader = house.add(tokens, root=b"r")
    follower = house.add(tokens, root=b"r", leader=leader, index=1)
    assert shares(house.step()[0]) == [(leader, 6)]
    assert shares(house.step()[0]) == [(leader, 4)]
    assert shares(house.step()[0]) == [(leader, 1), (follower, 2)]


def test_without_room_the_youngest_gives_way_and_finishes_later() -> None:
    house = House(pages=4)
    first, second = house.add(7, max_tokens=9), house.add(7, max_tokens=9)
    done: list[Sequence] = []
    preempted = False
    for _ in range(60):
        work, failed = house.step()
        assert not failed
        done += [w.sequence for w in work if w.sequence.phase is Phase.ENDED]
        preempted |= second.phase is Phase.WAITING
    assert preempted
    assert done == [first, second]
    assert first.output_length == second.output_length == 9


def test_what_outgrows_the_memory_alone_waits_and_is_not_started_again() -> None:
    house = House(pages=2)
    sequence = house.add(4, max_tokens=20)
    for _ in range(12):
        house.step()
    assert house.scheduler.running == []
    assert list(house.scheduler.waiting) == [sequence]
    assert len(sequence.tokens) == 9  # two pages of four, and the token that found no room
    assert house.memory.pages.held == 0


def test_nobody_takes_the_pages_that_an_earlier_request_waits_for() -> None:
    house = House(pages=10)
    house.add(20, max_tokens=12)
    house.step()
    large, small = house.add(24), house.add(2)
    for _ in range(8):
        work, _ = house.step()
        assert small not in [w.sequence for w in work]
    for _ in range(6):
        house.step()
    assert large.started


def test_adapters_of_the_next_requests_are_asked_for_while_the_rows_are_full() -> None:
    house = House(max_rows=1)
    house.add(2, max_tokens=20)
    house.step()
    house.gate.absent.update("sha256:" + c * 64 for c in "abc")
    for c in "abc":
        house.add(2, mix=mix(c))
    house.step()
    assert house.gate.kept[mix("a").digest] == set()
    assert house.gate.kept[mix("b").digest] == {"sha256:" + "a" * 64}
    assert mix("c").digest not in house.gate.kept  # two rows ahead at most


def test_expired_names_only_those_that_never_started() -> None:
    house = House(max_rows=1)
    started, waiting = house.add(2), house.add(2)
    house.step()
    assert started.started
    assert list(house.scheduler.expired(29.0)) == []
    assert list(house.scheduler.expired(31.0)) == [waiting]


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3)),
        min_size=1,
        max_size=12,
    ),
    st.integers(12, 40),
    st.integers(1, 5),
)
def test_every_request_ends_and_nothing_is_lost(
    requests: list[tuple[int, int, int]], pages: int, rows: int
) -> None:
    house = House(pages=pages, max_rows=rows)
    added = []
    for i, (prompt, max_tokens, arrival) in enumerate(requests):
        if i and arrival == 0:
            house.step()
        added.append(house.add([1] * prompt, max_tokens, root=b"r"))
    for _ in range(2000):
        _, failed = house.step()
        assert not failed
        if not house.scheduler.running and not house.scheduler.waiting:
            break
    assert [s.output_length for s in added] == [max_tokens for _, max_tokens, _ in requests]
    assert house.memory.pages.held == 0


def test_finish_is_idempotent_wherever_the_sequence_is() -> None:
    house = House(max_rows=1)
    running, waiting = house.add(2), house.add(2)
    house.step()
    for sequence in (running, waiting, running):
        house.scheduler.finish(sequence)
    assert not house.scheduler.running
    assert not house.scheduler.waiting
    assert house.memory.pages.held == 0
    with pytest.raises(KeyError):
        house.gate.pins["unknown"]
