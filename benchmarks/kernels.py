"""The kernels beside the base products of SmolLM2-135M: `python -m benchmarks.kernels [--csv]`.

Every figure is milliseconds of one whole step: 30 distinct layers of four patched weights, so that
nothing stays in a cache between calls that would not stay there in the engine (a benchmark that
repeats one layer looks twice as good). Base and base + deltas alternate in one process; the added
time is the difference of their medians. `predicted` is bytes / bandwidth, the bandwidth being that
of a copy in the same run; `foreign` is the share of the machine that other processes used.

With `--threads 1` the clock is the thread's CPU time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import RESULTS, Meter, Provenance, aligned, bind_cpus, write_csv
from gossamer.kernels import (
    Backend,
    BoundDeltas,
    PackedDelta,
    Piece,
    Saved,
    Target,
    WorkPlan,
    apply,
    bind,
    fuse_into,
    linear,
    new_kv_pages,
    pack,
    paged_attention,
    restore,
    to_dense,
    warm_up,
    write_kv,
)

#: (out, in, rows of the packed projections) of SmolLM2-135M's patched weights, 30 layers of each.
WEIGHTS = [
    (960, 576, (576, 192, 192)),
    (576, 576, (576,)),
    (3072, 576, (1536, 1536)),
    (576, 1536, (576,)),
]
LAYERS = 30
VOCABULARY = 49152
DENSITIES = (0.0005, 0.005, 0.01, 0.023, 0.1)
HEADS, KV_HEADS, HEAD_DIM, PAGE = 9, 3, 64, 16
RowSlots = Sequence[tuple[int, ...]]


class Line(NamedTuple):
    """One measurement, times in milliseconds a step."""

    what: str
    kind: str
    density: float
    rows: int
    entries: int
    megabytes: float
    predicted: float
    added: float
    base: float
    share: float
    foreign: float


@dataclass(frozen=True)
class Bench:
    """The base products and how to time."""

    base: list[list[Tensor]]
    rounds: int
    bandwidth: float
    clock: Callable[[], float]

    def inputs(self, rows: int) -> dict[int, Tensor]:
        return {columns: torch.randn(rows, columns) for columns in (576, 1536)}

    def products(self, x: dict[int, Tensor], backend: Backend = "cpu") -> None:
        """All products of a step, by the columns of their weight."""
        for layer in self.base:
            for weight in layer:
                linear(x[weight.shape[0]], weight, True, backend)

    def alternate(self, *steps: Callable[[], object]) -> tuple[list[float], float]:
        """Median milliseconds of each step, run in turn; and the foreign share."""
        times: list[list[float]] = [[] for _ in steps]
        with Meter() as meter:
            for _ in range(self.rounds + 1):
                for step, collected in zip(steps, times, strict=True):
                    start = self.clock()
                    step()
                    collected.append(1e3 * (self.clock() - start))
        return [statistics.median(t[1:]) for t in times], meter.foreign


def bandwidth() -> float:
    """Bytes a second that a copy moves, reading and writing."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times)


def random_piece(
    kind: str, rows: int, columns: int, density: float, offset: int, projection: int
) -> Piece:
    """A random mask of exactly the asked density; tiles of 16 for "block"."""
    side = 16 if kind == "block" else 1
    cells = rows * columns // side**2
    count = max(1, round(cells * density))
    positions = torch.randperm(cells)[:count].sort().values
    shape = (count, side, side) if kind == "block" else (count,)
    values = torch.randn(shape)
    return Piece("block" if kind == "block" else "element", projection, offset, rows, side,
                 positions, values)  # fmt: skip


def random_delta(
    kind: str, weight: tuple[int, int, tuple[int, ...]], density: float
) -> PackedDelta:
    return pack(pieces_of(kind, weight, density), weight[:2], len(weight[2]))


def pieces_of(kind: str, weight: tuple[int, int, tuple[int, ...]], density: float) -> list[Piece]:
    """One piece for every packed projection."""
    pieces, offset = [], 0
    for projection, rows in enumerate(weight[2]):
        pieces.append(random_piece(kind, rows, weight[1], density, offset, projection))
        offset += rows
    return pieces


def residents(kind: str, density: float, count: int) -> list[list[BoundDeltas]]:
    """`count` adapters on every weight of every layer."""
    return [
        [bind([random_delta(kind, w, density) for _ in range(count)], w[:2]) for w in WEIGHTS]
        for _ in range(LAYERS)
    ]


def added(
    bench: Bench, what: str, kind: str, density: float, deltas: list[list[BoundDeltas]],
    row_slots: RowSlots,
) -> Line:  # fmt: skip
    """Time that the deltas add to a step of base products."""
    plan = WorkPlan.build(row_slots)
    rows = len(row_slots)
    weights = torch.rand(rows, max(1, plan.members), 1) + 0.5
    x = bench.inputs(rows)

    def base() -> None:
        bench.products(x)

    def mixed() -> None:
        for layer, bound in zip(bench.base, deltas, strict=True):
            for weight, b in zip(layer, bound, strict=True):
                y = linear(x[weight.shape[0]], weight, transposed=True)
                apply(y, x[weight.shape[0]], b, plan, weights)

    (base_ms, mixed_ms), foreign = bench.alternate(base, mixed)
    used = {slot for slots in row_slots for slot in slots}
    packed = [b.deltas[s] for layer in deltas for b in layer for s in used]
    present = [p for p in packed if p is not None]
    nbytes = sum(p.data.nbytes for p in present)
    return Line(what, kind, density, rows, sum(p.nnz for p in present), nbytes / 1e6,
                1e3 * nbytes / bench.bandwidth, mixed_ms - base_ms, base_ms,
                base_ms / mixed_ms, foreign)  # fmt: skip


def products(bench: Bench) -> list[Line]:
    """The base's own products and the output head: ours, with the library's as the base."""
    lines = []
    head = torch.randn(VOCABULARY, WEIGHTS[0][1])
    layers = sum(w.nbytes for layer in bench.base for w in layer)
    for rows in (1, 4, 8, 12, 16, 20, 24, 32):
        x = bench.inputs(rows)
        cases: tuple[tuple[str, int, Callable[[Backend], object]], ...] = (
            ("base products", layers, lambda backend, x=x: bench.products(x, backend)),
            ("output head", head.nbytes,
             lambda backend, x=x: linear(x[WEIGHTS[0][1]], head, False, backend)),
        )  # fmt: skip
        for what, nbytes, step in cases:
            (ours, library), foreign = bench.alternate(
                lambda step=step: step("cpu"), lambda step=step: step("reference")
            )
            lines.append(Line(what, "dense", 1.0, rows, 0, nbytes / 1e6,
                              1e3 * nbytes / bench.bandwidth, ours - library, library,
                              library / ours, foreign))  # fmt: skip
    return lines


def decode(bench: Bench) -> list[Line]:
    """16 rows: over 8 adapters, all on one, all on one mix of 4; element and block."""
    lines = []
    cases = [("element", d) for d in DENSITIES] + [("block", d) for d in DENSITIES[2:]]
    for kind, density in cases:
        deltas = residents(kind, density, 8)
        for what, row_slots in (
            ("16 rows, 8 adapters", [(i // 2,) for i in range(16)]),
            ("16 rows, 1 adapter", [(0,)] * 16),
            ("16 rows, one mix of 4", [(0, 1, 2, 3)] * 16),
            ("16 rows, a pair each", [(i % 8, (i + 1 + i // 8) % 8) for i in range(16)]),
        ):
            lines.append(added(bench, what, kind, density, deltas, row_slots))
    return lines


def prefill(bench: Bench) -> list[Line]:
    """512 rows of one adapter, beside a dense scratch of Δ with a second product."""
    lines = []
    for density in (0.01, 0.1, 0.3):
        deltas = residents("element", density, 1)
        lines.append(added(bench, "512 rows, 1 adapter", "element", density, deltas, [(0,)] * 512))
        lines.append(dense_scratch(bench, density, deltas))
    return lines


def dense_scratch(bench: Bench, density: float, deltas: list[list[BoundDeltas]]) -> Line:
    """What a dense scratch would add: zero it, scatter Δ into it, multiply, add."""
    x = bench.inputs(512)
    scratch = [torch.empty(w[1], w[0]) for w in WEIGHTS]
    one = torch.ones(1, 1)

    def base() -> None:
        bench.products(x)

    def mixed() -> None:
        for layer, bound in zip(bench.base, deltas, strict=True):
            for weight, b, room in zip(layer, bound, scratch, strict=True):
                y = linear(x[weight.shape[0]], weight, transposed=True)
                fuse_into([Target(room.zero_(), [p for p in b.deltas if p], one, True)])
                y.addmm_(x[weight.shape[0]], room)

    (base_ms, mixed_ms), foreign = bench.alternate(base, mixed)
    nbytes = sum(4 * w[0] * w[1] for w in WEIGHTS) * LAYERS
    return Line("512 rows, dense scratch", "element", density, 512, 0, nbytes / 1e6,
                base_ms, mixed_ms - base_ms, base_ms, base_ms / mixed_ms, foreign)  # fmt: skip


def fusing(bench: Bench) -> list[Line]:
    """Writing one adapter into the weights and taking it out again."""
    cases = (("element", 0.01), ("element", 0.1), ("block", 0.1))
    return [line for kind, density in cases for line in fuse_and_restore(bench, kind, density)]


def fuse_and_restore(bench: Bench, kind: str, density: float) -> list[Line]:
    deltas = [[random_delta(kind, w, density) for w in WEIGHTS] for _ in range(LAYERS)]
    one = torch.ones(1, 1)
    targets = [
        Target(weight, [delta], one, transposed=True)
        for layer, row in zip(bench.base, deltas, strict=True)
        for weight, delta in zip(layer, row, strict=True)
    ]
    saved: list[Saved] = []

    def fuse() -> None:
        saved[:] = [fuse_into(targets)]

    def undo() -> None:
        restore(saved[0])

    times, foreign = bench.alternate(fuse, undo)
    entries = sum(d.nnz for row in deltas for d in row)
    nbytes = sum(d.data.nbytes for row in deltas for d in row) + 12 * entries
    predicted = 1e3 * nbytes / bench.bandwidth
    return [
        Line(what, kind, density, 0, entries, nbytes / 1e6, predicted, milliseconds, 0, 0, foreign)
        for what, milliseconds in zip(("fuse", "restore"), times, strict=True)
    ]


def packing(bench: Bench) -> list[Line]:
    """Packing one adapter: all its pieces on every weight of one layer, times 30."""
    lines = []
    for kind, density in (("element", 0.0005), ("element", 0.01), ("element", 0.1), ("block", 0.1)):
        layer = [
            (
                [
                    random_piece(kind, n, w[1], density, sum(w[2][:i]), i)
                    for i, n in enumerate(w[2])
                ],
                w,
            )
            for w in WEIGHTS
        ]
        packed = [pack(pieces, w[:2], len(w[2])) for pieces, w in layer]

        def run(layer: list[Any] = layer) -> None:
            for _ in range(LAYERS):
                for pieces, w in layer:
                    pack(pieces, w[:2], len(w[2]))

        (milliseconds,), foreign = bench.alternate(run)
        entries = LAYERS * sum(p.nnz for p in packed)
        nbytes = LAYERS * sum(p.data.nbytes for p in packed)
        moved = nbytes + 12 * entries
        lines.append(Line("pack", kind, density, 0, entries, nbytes / 1e6,
                          1e3 * moved / bench.bandwidth, milliseconds, 0, 0, foreign))  # fmt: skip
    return lines


def attention(bench: Bench) -> list[Line]:
    """Paged attention of one step: 16 decoding rows, and chunks of a prefill."""
    lines = []
    for what, lengths in (
        ("attention, 16 decoding", [(1, 50 + 7 * i) for i in range(16)]),
        ("attention, 16 decoding at 1 k", [(1, 1000 + 7 * i) for i in range(16)]),
        ("attention, 512 prefill", [(512, 512)]),
    ):
        rows = sum(count for count, _ in lengths)
        pages = [-(-context // PAGE) for _, context in lengths]
        pools = [new_kv_pages(sum(pages), PAGE, KV_HEADS, HEAD_DIM) for _ in range(LAYERS)]
        for pool in pools:
            for tensor in pool:
                tensor.normal_()
        table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
        for i, count in enumerate(pages):
            table[i, :count] = sum(pages[:i]) + torch.arange(count)
        counts = torch.tensor([0] + [count for count, _ in lengths])
        starts = counts.cumsum(0).to(torch.int32)
        context_len = torch.tensor([c for _, c in lengths], dtype=torch.int32)
        q, kv = torch.randn(rows, HEADS, HEAD_DIM), torch.randn(rows, KV_HEADS, HEAD_DIM)
        slots = torch.arange(rows)

        def step(
            pools: list[tuple[Tensor, Tensor]] = pools, q: Tensor = q, kv: Tensor = kv,
            table: Tensor = table, starts: Tensor = starts, context_len: Tensor = context_len,
            slots: Tensor = slots,
        ) -> None:  # fmt: skip
            for k_pages, v_pages in pools:
                write_kv(kv, kv, k_pages, v_pages, slots)
                paged_attention(q, k_pages, v_pages, table, starts, context_len, HEAD_DIM**-0.5)

        (milliseconds,), foreign = bench.alternate(step)
        nbytes = LAYERS * sum(c for _, c in lengths) * KV_HEADS * HEAD_DIM * 8
        lines.append(Line(what, "attention", 1.0, rows, 0, nbytes / 1e6,
                          1e3 * nbytes / bench.bandwidth, milliseconds, 0, 0, foreign))  # fmt: skip
    return lines


SECTIONS = {
    "products": products,
    "decode": decode,
    "prefill": prefill,
    "fusing": fusing,
    "packing": packing,
    "attention": attention,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path, nargs="?", const=RESULTS / "kernels.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    bind_cpus(options.threads)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    warm_up()
    warm = time.perf_counter() - start
    base = [[torch.randn(w[1], w[0]) for w in WEIGHTS] for _ in range(LAYERS)]
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    bench = Bench(base, options.rounds, bandwidth(), clock)
    print(
        f"copy {bench.bandwidth / 1e9:.1f} GB/s, {options.threads} threads, warm-up {warm:.1f} s\n"
    )
    check(bench)
    lines = [line for name in options.only for line in SECTIONS[name](bench)]
    print(aligned([*Line._fields], [[show(value) for value in line] for line in lines]))
    if options.csv:
        extra = {
            **Provenance.here().columns(),
            "threads": str(options.threads),
            "copy_gb_s": f"{bench.bandwidth / 1e9:.1f}",
        }
        named = [dict(zip(Line._fields, map(show, line), strict=True)) for line in lines]
        write_csv(options.csv, [{**line, **extra} for line in named])


def check(bench: Bench) -> None:
    """What is timed is also right: one weight against its dense difference."""
    rows, columns, parts = WEIGHTS[0]
    delta = random_delta("element", WEIGHTS[0], 0.01)
    x, y = bench.inputs(16)[columns], torch.zeros(16, rows)
    apply(y, x, bind([delta], (rows, columns)), WorkPlan.build([(0,)] * 16), torch.ones(16, 1, 1))
    torch.testing.assert_close(y, x @ to_dense(delta).t(), rtol=1e-4, atol=1e-4)
    assert len(parts) == delta.projections


def show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
