"""KV pages: sharing, counting, eviction, as a state machine against a plain model."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gossamer.engine.pages import PagePool, next_key, root_key

SIZE = 4


def keys_of(root: bytes, tokens: list[int]) -> list[bytes]:
    keys, key = [], root
    for start in range(0, len(tokens) - len(tokens) % SIZE, SIZE):
        key = next_key(key, tokens[start : start + SIZE])
        keys.append(key)
    return keys


def store(pool: PagePool, root: bytes, tokens: list[int]) -> list[int]:
    pages = [pool.allocate() for _ in range(-(-len(tokens) // SIZE))]
    for page, key in zip(pages, keys_of(root, tokens), strict=False):
        pool.name(page, key)
    return pages


@pytest.mark.parametrize(
    "other",
    [
        root_key("base2", "mix", b"salt"),
        root_key("base", "mix2", b"salt"),
        root_key("base", "mix", b"salt2"),
        root_key("basem", "ix", b"salt"),
    ],
)
def test_prefixes_are_never_shared_across_base_mix_or_tenant(other: bytes) -> None:
    pool = PagePool(8, SIZE)
    tokens = list(range(9))
    root = root_key("base", "mix", b"salt")
    pages = store(pool, root, tokens)
    assert pool.match(root, tokens) == pages[:2]
    assert pool.match(other, tokens) == []


def test_the_last_token_is_always_left_to_compute() -> None:
    pool = PagePool(8, SIZE)
    pages = store(pool, b"r", list(range(8)))
    assert pool.match(b"r", list(range(8))) == pages[:1]
    assert pool.match(b"r", list(range(9))) == pages


def test_a_forgotten_page_is_not_found_again() -> None:
    pool = PagePool(8, SIZE)
    pages = store(pool, b"r", list(range(8)))
    pool.forget(pages)
    pool.release(pages, 1)
    assert pool.match(b"r", list(range(9))) == []
    assert pool.free == 8


def test_the_page_released_first_is_evicted_first_and_the_end_of_a_chain_before_its_start() -> None:
    pool = PagePool(4, SIZE)
    first, second = store(pool, b"a", list(range(8))), store(pool, b"b", list(range(8)))
    pool.release(first, 1)
    pool.release(second, 2)
    assert pool.oldest_cached() == 1
    pool.evict()
    assert pool.match(b"a", list(range(9))) == first[:1]
    assert pool.match(b"b", list(range(9))) == second


class PoolMachine(RuleBasedStateMachine):
    """Sequences come and go; what is found must be what was stored."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, SIZE)
        self.content: dict[int, tuple[bytes, ...]] = {}
        self.holders: list[list[int]] = []
        self.clock = 0

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        root=st.sampled_from([b"x", b"y"]),
    )
    def begin(self, tokens: list[int], root: bytes) -> None:
        found = self.pool.match(root, tokens)
        keys = keys_of(root, tokens)
        for page, key in zip(found, keys, strict=False):
            assert self.content[page] == (key,)
        missing = -(-len(tokens) // SIZE) - len(found)
        if missing > self.pool.free + self.pool.cached:
            self.pool.release(found, self.clock)
            return
        while self.pool.free < missing:
            self.pool.evict()
        pages = found + [self.pool.allocate() for _ in range(missing)]
        for page, key in list(zip(pages, keys, strict=False))[len(found) :]:
            self.pool.name(page, key)
            self.content[page] = (key,)
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), trusted=st.booleans())
    def end(self, data: st.DataObject, trusted: bool) -> None:
        pages = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.clock += 1
        if not trusted:
            self.pool.forget(pages)
        self.pool.release(pages, self.clock)

    @invariant()
    def sound(self) -> None:
        self.pool.check_integrity()
        held = {page for pages in self.holders for page in pages}
        assert self.pool.held == len(held)


TestPoolMachine = PoolMachine.TestCase


def test_the_integrity_check_sees_a_page_in_two_states() -> None:
    pool = PagePool(4, SIZE)
    page = pool.allocate()
    pool._free.append(page)
    with pytest.raises(RuntimeError, match="two states"):
        pool.check_integrity()
