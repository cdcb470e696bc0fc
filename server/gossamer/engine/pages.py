"""KV pages: who holds which, and which of them can be shared. Plain Python, no tensors.

A page holds the keys and values of `page_size` consecutive tokens. A full page is known by a chain
of hashes over (root, all tokens up to its end); the root says base, mix and tenant, never a name.
A page nobody holds stays findable until its memory is wanted.

Source: the block manager of nano-vllm, with the root and the byte budget added.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gossamer.engine.frames import Frames

PrefixKey = bytes


def root_key(fingerprint: str, mix_digest: str, salt: bytes) -> PrefixKey:
    """Where a chain of page keys starts: equal only for the same base, mix and tenant salt."""
    h = hashlib.sha256(b"gossamer-kv\0")
    for part in (fingerprint.encode(), mix_digest.encode(), salt):
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()


def next_key(parent: PrefixKey, tokens: Sequence[int]) -> PrefixKey:
    """The key of the full page that holds `tokens` and follows the page `parent`."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class PagePool:
    """`num_pages` pages with reference counts and an index of the full ones.

    A page is *held* (count > 0), *cached* (count 0 but findable by its key) or *free*.

    Args:
        num_pages: how many there can be.
        page_size: tokens of a page.
        frames: where pages lie, when that is not simply where their number says.
    """

    def __init__(self, num_pages: int, page_size: int, frames: Frames | None = None) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._frames = frames
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: low ids are used first and again
        self._count: dict[int, int] = {}
        self._key_of: dict[int, PrefixKey] = {}
        self._page_of: dict[PrefixKey, int] = {}
        self._cached: OrderedDict[int, int] = OrderedDict()  # page → stamp, oldest first

    @property
    def used(self) -> int:
        """Pages that are held or cached."""
        return self.num_pages - len(self._free)

    @property
    def held(self) -> int:
        """Pages that some sequence holds."""
        return len(self._count)

    @property
    def cached(self) -> int:
        """Pages that nobody holds but that could be found again."""
        return len(self._cached)

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    def oldest_cached(self) -> int | None:
        """The stamp of the cached page that was released first, or None."""
        return next(iter(self._cached.values()), None)

    def match(self, root: PrefixKey, tokens: Sequence[int]) -> list[int]:
        """Hold and return the pages that already store a prefix of `tokens`.

        Never all of `tokens`: the last one must be computed, its logits are wanted.
        """
        found: list[int] = []
        key = root
        size = self.page_size
        for start in range(0, len(tokens) - size, size):
            key = next_key(key, tokens[start : start + size])
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        for page in found:
            self._count[page] = self._count.get(page, 0) + 1
            self._cached.pop(page, None)
        return found

    def allocate(self) -> int:
        """Hold one free page. The caller has checked `free`."""
        page = self._free.pop()
        self._count[page] = 1
        if self._frames is not None:
            self._frames.take(page)
        return page

    def name(self, page: int, key: PrefixKey) -> None:
        """Make a full page findable. Of two pages with one content the first stays known."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int], stamp: int) -> None:
        """Let go of pages; those with a key stay cached under `stamp`, the others become free."""
        for page in reversed(pages):  # the end of a chain is evicted before its beginning
            self._count[page] -= 1
            if self._count[page]:
                continue
            del self._count[page]
            if page in self._key_of:
                self._cached[page] = stamp
            else:
                self._vacate(page)

    def forget(self, pages: Sequence[int]) -> None:
        """Make pages unfindable (their content is not to be trusted)."""
        for page in pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]
            if self._cached.pop(page, None) is not None:
                self._vacate(page)

    def evict(self) -> None:
        """Turn the cached page that was released first into a free one."""
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        self._vacate(page)

    def _vacate(self, page: int) -> None:
        self._free.append(page)
        if self._frames is not None:
            self._frames.drop(page)

    def check_integrity(self) -> None:
        """Raise `RuntimeError` unless every page is in exactly one state."""
        held, cached, free = set(self._count), set(self._cached), set(self._free)
        whole = len(held) + len(cached) + len(free) == self.num_pages
        if not whole or held & cached or held & free or cached & free:
            raise RuntimeError("a KV page is in two states or in none")
        if len(free) != len(self._free) or any(count < 1 for count in self._count.values()):
            raise RuntimeError("a KV page is free twice, or held by nobody")
        if {k: p for p, k in self._key_of.items()} != self._page_of or not cached <= set(
            self._key_of
        ):
            raise RuntimeError("the prefix index disagrees with the pages")
