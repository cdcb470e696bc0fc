"""What of the engine's inside the benchmark uses. Nothing else in it does.

Steps are timed on an engine that has been made and not been started, so that no other thread runs
them; adapters come in by the engine's own way, from the tier of packed ones on the host.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from gossamer.engine.client import Engine
from gossamer.engine.messages import Request
from gossamer.engine.scheduler import Work
from gossamer.engine.sequence import Sequence as Row
from gossamer.kernels import PackedDelta
from gossamer.merge import Member, Mix, canonical

Applied = tuple[tuple[str, float], ...]

_PATIENCE = 30.0


class NotLoadedError(Exception):
    """An adapter did not come in."""

    def __init__(self, key: str, seconds: float) -> None:
        super().__init__(f"{key} is not in memory after {seconds:g} s")
        self.key = key
        self.seconds = seconds


def mix_of(*keys: str) -> Mix:
    """The mix of some adapters, all with weight 1."""
    return canonical([Member(key, 1.0) for key in keys])


class Inside:
    """The parts of an engine. Not started: all of it. Started: `keep` and `page_bytes`."""

    def __init__(self, engine: Engine) -> None:
        self._runner = engine._loop._runner  # noqa: SLF001
        self._memory = engine._memory  # noqa: SLF001
        self._residency = engine._residency  # noqa: SLF001
        self._pinned: list[Mix] = []

    @property
    def page_bytes(self) -> int:
        """Of a KV page of all layers, the unit in which memory is given out."""
        return self._memory.page_bytes

    @property
    def room(self) -> int:
        """Bytes that adapters may take beside the rows' pages."""
        return self._memory.total_bytes - self._memory.kv_bytes

    @property
    def weights(self) -> Mapping[str, tuple[tuple[int, ...], int]]:
        """Patched weight → rows of its projections, columns."""
        return {n: (w.rows, w.in_features) for n, w in self._runner.patch_map.weights.items()}

    def keep(self, keys: Sequence[str], deltas: Mapping[str, PackedDelta]) -> int:
        """Put an adapter into the host's tier under several keys, as if each had been packed.

        Returns:
            its bytes.
        """
        adapters = self._runner.adapters
        if adapters.tier is None:
            raise RuntimeError("an engine on the CPU has no tier")
        packed = adapters._in_one_buffer(dict(deltas))  # noqa: SLF001
        for key in keys:
            adapters.tier.put(key, packed)
        return packed.nbytes

    def load(self, keys: Sequence[str]) -> float:
        """Have adapters in memory, and let go of those before; seconds that it took.

        Raises:
            NotLoadedError: one did not come in.
        """
        for mix in self._pinned:
            self._residency.unpin(mix)
        self._pinned = []
        start = time.perf_counter()
        for key in keys:
            mix = mix_of(key)
            while not self._residency.ready(mix, keys):
                self._residency.settle()
                if time.perf_counter() - start > _PATIENCE:
                    raise NotLoadedError(key, _PATIENCE)
                time.sleep(1e-4)
            self._residency.pin(mix)
            self._pinned.append(mix)
        self._residency.settle()
        return time.perf_counter() - start

    def decoding(self, rows: int, context: int) -> list[Work]:
        """Rows that have looked back on `context` tokens and draw another one.

        Their prompts are computed by the base.
        """
        found = []
        for row in range(rows):
            tokens = tuple((7 * i + row) % 300 + 2 for i in range(context))
            sequence = Row(Request(f"row {row}", tokens), 0, None, 0.0)
            if not sequence.extend_pages(self._memory, context):
                raise RuntimeError(f"no room for {rows} rows of {context} tokens")
            if context > 1:
                self._runner.run([Work(sequence, 0, context - 1)], [()], {})
            found.append(Work(sequence, context - 1, 1))
        return found

    def step(self, work: Sequence[Work], applied: Sequence[Applied]) -> Tensor:
        """Logits [rows, vocabulary] of a step; on a card they are on their way."""
        keys = {key for pairs in applied for key, _ in pairs}
        residents = {key: self._residency.resident(key) for key in keys}
        return self._runner.run(work, applied, residents)

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Every kernel of a step is started by the host meanwhile."""
        graphs, self._runner._graphs = self._runner._graphs, None  # noqa: SLF001
        try:
            yield
        finally:
            self._runner._graphs = graphs  # noqa: SLF001
