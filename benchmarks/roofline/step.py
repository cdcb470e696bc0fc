"""A decode step: what it moves, what it computes, how many kernels it starts.

A step is a chain of stages. The stage of a patched weight is two branches of a graph that meet
again: the product, and the deltas' copies of x and their terms, which whoever reads the product
adds. Memory is shared by both and nothing else is, so the stage takes

    max(launch + (base + delta bytes) / bandwidth,
        2 launches + max(delta bytes / bandwidth, instructions / rate)).

What one kernel writes and the next one reads is counted as written and as read, in base-only steps
too, although the second-level cache may hold it (`Rates.handed_on`). Not counted: waiting for
dependent loads, the end of a launch when few programs are left, and everything outside the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.roofline.cards import Rates
from benchmarks.roofline.models import BYTES, Model, Weight
from benchmarks.roofline.packed import Coding, expected
from gossamer.kernels.plan import CHUNK_ROWS

#: Kernels of a layer beside its four products: two norms, rotation and KV write, attention, gating.
#: Sums, and the terms of deltas, are part of them.
LAYER_LAUNCHES = 5
#: Kernels of a step outside the layers: embedding, last norm, output head, and four for sampling.
STEP_LAUNCHES = 7
#: Of the branch beside a product: the copies of x, and the terms.
DELTA_LAUNCHES = 2


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows that decode at once.

    Attributes:
        rows: of the step.
        adapters: distinct ones in the step, spread evenly. More than rows: every row runs a mix of
            `adapters / rows` members.
        density: of each adapter, over all patched weights.
        coding: of their values.
        context: tokens that each row looks back on.
    """

    rows: int
    adapters: int
    density: float
    coding: Coding
    context: int


@dataclass(frozen=True, slots=True)
class Step:
    """A predicted step.

    Attributes:
        seconds: of the whole step.
        nbytes: moved.
        launches: seconds of it that go to starting kernels on the branch that takes longer.
        limited: whether some weight's deltas wait for instructions and not for memory.
    """

    seconds: float
    nbytes: float
    launches: float
    limited: bool


@dataclass(frozen=True, slots=True)
class _Stage:
    base: float
    delta: float = 0.0
    instructions: float = 0.0
    launches: int = 1
    delta_launches: int = 0

    def on(self, rates: Rates) -> Step:
        together = self.base + self.delta
        work = self.instructions / rates.instructions
        starts, delta_starts = self.launches * rates.launch, self.delta_launches * rates.launch
        product = starts + together / rates.bandwidth
        beside = delta_starts + max(self.delta / rates.bandwidth, work)
        if beside > product:
            return Step(beside, together, delta_starts, work > self.delta / rates.bandwidth)
        return Step(product, together, starts, False)


def chunks(rows: int, adapters: int) -> list[tuple[int, int]]:
    """(rows, members) of each chunk of a step whose adapters are spread evenly."""
    if not adapters:
        return []
    if adapters > rows:
        return [(1, members) for members in _shares(adapters, rows)]
    found = []
    for each in _shares(rows, adapters):
        found += [(CHUNK_ROWS, 1)] * (each // CHUNK_ROWS)
        found += [(each % CHUNK_ROWS, 1)] if each % CHUNK_ROWS else []
    return found


def width(rows: int) -> int:
    """Rows of the copy of x that a chunk reads: the next power of two."""
    return 1 << (rows - 1).bit_length()


def handed_on(weight: Weight, rows: int, adapters: int) -> float:
    """What the deltas of a weight hand on: x, its copies, the terms. Bytes written and read."""
    copied = sum(width(count) for count, _ in chunks(rows, adapters))
    x = weight.columns * BYTES * (rows + 2 * copied)
    return x + 2 * 4 * rows * weight.rows


def decode_step(model: Model, rates: Rates, load: Workload) -> Step:
    """The predicted step of a workload."""
    layer = [_weight_stage(weight, rates, load) for weight in model.weights]
    attention = _Stage(load.rows * load.context * model.kv_bytes, launches=LAYER_LAUNCHES)
    logits = rates.handed_on * 2 * BYTES * load.rows * model.vocabulary
    head = _Stage(BYTES * model.vocabulary * model.hidden + logits, launches=STEP_LAUNCHES)
    one = _total(stage.on(rates) for stage in (*layer, attention))
    return _total([*([one] * model.layers), head.on(rates)])


def resident_bytes(model: Model, load: Workload) -> float:
    """What must be in the device's memory: the model, the keys and values, the adapters."""
    kept = model.layers * model.kv_bytes * load.rows * load.context
    return model.nbytes + kept + load.adapters * adapter_bytes(model, load.density, load.coding)


@functools.cache
def adapter_bytes(model: Model, density: float, coding: Coding) -> float:
    """Bytes of one adapter's buffers."""
    each = (expected(w.rows, w.columns, density, coding).stored_bytes for w in model.weights)
    return model.layers * sum(each)


def _weight_stage(weight: Weight, rates: Rates, load: Workload) -> _Stage:
    """The product of a weight, and beside it the deltas."""
    rows = load.rows
    x_and_y = 2 * BYTES * rows * (weight.columns + weight.rows)
    base = BYTES * weight.elements + rates.handed_on * x_and_y
    if not load.adapters:
        return _Stage(base)
    packed = expected(weight.rows, weight.columns, load.density, load.coding)
    work = sum(
        members * packed.instructions(width(count))
        for count, members in chunks(rows, load.adapters)
    )
    handed = rates.handed_on * handed_on(weight, rows, load.adapters)
    nbytes = load.adapters * packed.read_bytes + handed
    return _Stage(base, nbytes, work, delta_launches=DELTA_LAUNCHES)


def _shares(count: int, parts: int) -> list[int]:
    """`count` in `parts` as equal as can be."""
    small, more = divmod(count, parts)
    return [small + 1] * more + [small] * (parts - more)


def _total(steps: Iterable[Step]) -> Step:
    found = list(steps)
    return Step(
        sum(s.seconds for s in found),
        sum(s.nbytes for s in found),
        sum(s.launches for s in found),
        any(s.limited for s in found),
    )
