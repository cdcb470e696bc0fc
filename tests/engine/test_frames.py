"""Pages and adapters in one block of memory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.frames import Frames, Move, Run
from gossamer.engine.memory import Memory


def test_pages_fill_it_from_below_and_runs_from_above() -> None:
    frames = Frames(10)
    for page in (7, 3):
        frames.take(page)
    assert frames.of_page[[7, 3]].tolist() == [0, 1]
    assert frames.take_run(3) == (Run(7, 3), [])
    assert frames.take_run(2) == (Run(5, 2), [])
    frames.drop_run(Run(7, 3))
    assert frames.take_run(2) == (Run(8, 2), [])
    assert frames.free == 4


def test_pages_move_aside_and_as_few_as_possible() -> None:
    frames = Frames(8)
    for page in range(8):
        frames.take(page)
    for page in (0, 2, 4, 5):
        frames.drop(page)
    # Free are 0, 2, 4 and 5: three from 3 or from 4 on move one page, and 4 is higher.
    assert frames.take_run(3) == (Run(4, 3), [Move(6, 0)])
    assert frames.of_page[6] == 0
    frames.check_integrity()


def test_runs_do_not_move() -> None:
    frames = Frames(7)
    assert frames.take_run(2) == (Run(5, 2), [])
    assert frames.take_run(2) == (Run(3, 2), [])
    assert frames.take_run(2) == (Run(1, 2), [])
    frames.drop_run(Run(5, 2))
    frames.drop_run(Run(1, 2))
    assert frames.free == 5
    assert frames.take_run(4) is None
    assert frames.take_run(3) == (Run(0, 3), [])
    assert frames.take_run(0) is None
    assert frames.take_run(8) is None


PAGE = 100
FRAMES = 12
STEP = st.one_of(
    st.tuples(st.just("page"), st.just(0)),
    st.tuples(st.just("release"), st.integers(0, 30)),
    st.tuples(st.just("name"), st.integers(0, 30)),
    st.tuples(st.just("load"), st.integers(1, 700)),
    st.tuples(st.just("pin"), st.integers(0, 30)),
    st.tuples(st.just("unpin"), st.integers(0, 30)),
)


class Block:
    """A model of the block: what each frame holds, moved as `take_moves` says."""

    def __init__(self) -> None:
        self.memory: Memory[str] = Memory(FRAMES * PAGE, PAGE, 4, framed=True)
        assert self.memory.frames is not None
        self.frames = self.memory.frames
        self.holds: list[object] = [None] * FRAMES
        self.pages: list[int] = []
        self.pinned: list[str] = []

    def run_of(self, key: str) -> Run:
        entry = self.memory.get(key)
        assert entry is not None
        assert entry.run is not None
        return entry.run

    def act(self, number: int, what: str, n: int) -> None:
        memory = self.memory
        if what == "page":
            page = memory.allocate()
            if page is not None:
                self.pages.append(page)
                self.holds[self.frames.of_page[page]] = page
        elif what == "release" and self.pages:
            memory.pages.release([self.pages.pop(n % len(self.pages))], memory.tick())
        elif what == "name" and self.pages:
            memory.pages.name(self.pages[n % len(self.pages)], bytes([number]))
        elif what == "load":
            key = f"adapter {number}"
            if memory.add(key, key, n):
                for move in memory.take_moves():
                    self.holds[move.target] = self.holds[move.source]
                run = self.run_of(key)
                self.holds[run.first : run.first + run.count] = [key] * run.count
        elif what == "pin" and memory.resident():
            self.pinned.append(sorted(memory.resident())[n % len(memory.resident())])
            memory.pin(self.pinned[-1])
        elif what == "unpin" and self.pinned:
            memory.unpin(self.pinned.pop(n % len(self.pinned)))

    def check(self) -> None:
        self.memory.check_integrity()
        for page in self.pages:
            assert self.holds[self.frames.of_page[page]] == page
        for key in self.memory.resident():
            run = self.run_of(key)
            assert self.holds[run.first : run.first + run.count] == [key] * run.count


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=60))
def test_whatever_happens_everything_keeps_its_content(steps: list[tuple[str, int]]) -> None:
    block = Block()
    for number, (what, n) in enumerate(steps):
        block.act(number, what, n)
        block.check()


def test_what_lies_between_pinned_runs_is_freed_in_the_order_of_use() -> None:
    memory: Memory[str] = Memory(6 * PAGE, PAGE, 4, framed=True)
    for key in "abc":
        assert memory.add(key, key, 2 * PAGE)
        memory.tick()
    memory.pin("b")  # in the middle
    assert not memory.add("long", "", 3 * PAGE)
    assert memory.add("short", "", 2 * PAGE)
    memory.unpin("b")
    assert memory.add("long", "", 3 * PAGE)
    memory.check_integrity()


def test_a_page_that_is_not_where_its_frame_says_is_noticed() -> None:
    frames = Frames(3)
    frames.take(1)
    frames.of_page[1] = 2
    with pytest.raises(RuntimeError):
        frames.check_integrity()
