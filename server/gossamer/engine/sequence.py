"""One choice of one request while it is in the engine. Plain Python, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from gossamer.engine.pages import PrefixKey, next_key

if TYPE_CHECKING:
    from gossamer.engine.memory import Memory
    from gossamer.engine.messages import Request


class Phase(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False)
class Sequence:
    """Tokens so far, how many of them have keys and values stored, and where.

    Attributes:
        tokens: prompt, then what was drawn.
        computed: how many tokens have their keys and values in `pages`.
        root: prefix key before the first page; None when pages must not be shared.
        leader: the choice 0 of the same request; the others start after its prompt is computed
            and then find its pages.
        cached_tokens: prompt tokens that were found in shared pages at the first admission.
        started: whether it was admitted once.
        debt: steps in which a fused window held it back, less those that it was given since.
        held_seconds: how long it was held back altogether.
    """

    request: Request
    index: int
    root: PrefixKey | None
    arrived: float
    leader: Sequence | None = None
    tokens: list[int] = field(default_factory=list)
    phase: Phase = Phase.WAITING
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    started: bool = False
    debt: float = 0.0
    held_seconds: float = 0.0
    _named: int = 0
    _key: PrefixKey = b""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self._key = self.root or b""

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def output_length(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not stored yet; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """Whether the prompt is done and one token is drawn a step."""
        return self.output_length > 0 and self.pending == 1

    @property
    def remaining(self) -> int:
        """Most tokens it may still draw."""
        return self.request.sampling.max_tokens - self.output_length

    def must_wait(self) -> bool:
        """Whether the leader's prompt is still being computed."""
        leader = self.leader
        return (
            leader is not None
            and leader.phase is not Phase.ENDED
            and leader.computed < leader.prompt_length
        )

    def attach_prefix(self, memory: Memory[Any]) -> None:
        """Take over the shared pages that already hold the beginning of `tokens`."""
        if self.root is None or self.request.sampling.prompt_logprobs is not None:
            return
        self.pages = memory.pages.match(self.root, self.tokens)
        self.computed = len(self.pages) * memory.pages.page_size
        self._named = 0
        self._key = self.root
        self._walk_names(memory, name=False)
        if not self.started:
            self.cached_tokens = self.computed

    def extend_pages(self, memory: Memory[Any], upto: int) -> bool:
        """Hold pages for the first `upto` tokens. False if memory ends before."""
        size = memory.pages.page_size
        while len(self.pages) * size < upto:
            page = memory.allocate()
            if page is None:
                return False
            self.pages.append(page)
        return True

    def advance(self, memory: Memory[Any], count: int) -> None:
        """`count` more tokens are stored: full pages become findable."""
        self.computed += count
        if self.root is not None:
            self._walk_names(memory, name=True)

    def release(self, memory: Memory[Any], *, trusted: bool = True) -> None:
        """Let go of all pages. Untrusted ones (a step failed) are not kept for others."""
        if not trusted:
            memory.pages.forget(self.pages)
        memory.pages.release(self.pages, memory.tick())
        self.pages, self.computed, self._named = [], 0, 0
        self._key = self.root or b""

    def _walk_names(self, memory: Memory[Any], *, name: bool) -> None:
        size = memory.pages.page_size
        while (self._named + 1) * size <= self.computed:
            start = self._named * size
            self._key = next_key(self._key, self.tokens[start : start + size])
            if name:
                memory.pages.name(self.pages[self._named], self._key)
            self._named += 1
