"""One byte budget: what is evicted, in which order, and what never is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.engine.memory import Memory

PAGE = 100


def memory(total: int = 1000) -> Memory[str]:
    return Memory(total, PAGE, 4)


def load(mem: Memory[str], key: str, nbytes: int) -> bool:
    return mem.add(key, key.upper(), nbytes)


def test_the_least_recently_used_goes_first_whatever_its_kind() -> None:
    mem = memory()
    load(mem, "old", 300)
    mem.tick()
    page = mem.allocate()
    assert page is not None
    mem.pages.name(page, b"key")
    mem.pages.release([page], mem.tick())
    mem.tick()
    load(mem, "new", 500)
    assert load(mem, "next", 200)  # 100 were free: "old" goes, the page stays
    assert set(mem.resident()) == {"new", "next"}
    assert mem.pages.cached == 1
    assert load(mem, "last", 300)
    assert mem.pages.cached == 0
    assert set(mem.resident()) == {"new", "next", "last"}


def test_nothing_is_evicted_for_what_will_not_fit_anyway() -> None:
    mem = memory()
    load(mem, "pinned", 600)
    mem.pin("pinned")
    load(mem, "idle", 200)
    assert not load(mem, "large", 500)
    assert set(mem.resident()) == {"pinned", "idle"}
    assert not load(mem, "huge", 1001)
    assert set(mem.resident()) == {"pinned", "idle"}


def test_what_others_wait_for_is_kept() -> None:
    mem = memory()
    load(mem, "first", 400)
    load(mem, "second", 400)
    assert mem.available_bytes({"first"}) == 600
    assert not mem.add("third", "", 700, {"first"})
    assert mem.add("third", "", 600, {"first"})
    assert set(mem.resident()) == {"first", "third"}


def test_an_unpinned_adapter_makes_room_for_pages() -> None:
    mem = memory()
    load(mem, "a", 950)
    mem.pin("a")
    assert mem.allocate() is None
    mem.unpin("a")
    assert mem.allocate() is not None
    assert mem.resident() == {}
    assert mem.counts.evictions == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["load", "pin", "unpin", "page", "drop"]), st.integers(0, 7)),
        max_size=60,
    )
)
def test_the_ledger_always_adds_up_and_pins_hold(steps: list[tuple[str, int]]) -> None:
    mem = memory()
    pinned: list[str] = []
    pages: list[int] = []
    for action, n in steps:
        mem.tick()
        key = f"k{n}"
        if action == "load" and mem.get(key) is None:
            assert load(mem, key, 90 * (n + 1)) == (key in mem.resident())
        elif action == "pin" and key in mem.resident():
            mem.pin(key)
            pinned.append(key)
        elif action == "unpin" and pinned:
            mem.unpin(pinned.pop(n % len(pinned)))
        elif action == "page" and (page := mem.allocate()) is not None:
            pages.append(page)
        elif action == "drop" and pages:
            mem.pages.release([pages.pop(n % len(pages))], mem.tick())
        mem.check_integrity()
        assert set(pinned) <= set(mem.resident())
        assert mem.pages.held == len(pages)


def test_the_integrity_check_sees_bytes_that_do_not_add_up() -> None:
    mem = memory()
    load(mem, "a", 10)
    mem._entry_bytes += 1
    with pytest.raises(RuntimeError, match="add up"):
        mem.check_integrity()
