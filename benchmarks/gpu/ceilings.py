"""What the card reaches with what is not ours: copies, empty launches, the base's products."""

from __future__ import annotations

import statistics
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import repeated
from gossamer.kernels import program_pool

#: Empty kernels, one after the other: about as many as a decode step of 32 layers launches.
_CHAIN = 300


@triton.jit
def _nothing(x):  # type: ignore[no-untyped-def]
    """Semantics: nothing."""


def copy_bandwidth(setting: Setting) -> float:
    """Bytes read and written in a second by a long copy; the median of some."""
    source = torch.zeros(setting.copy_bytes, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    on_card = setting.device.type == "cuda"
    taken = repeated(lambda: target.copy_(source), 3 * setting.repetitions, on_card)
    return 2e3 * setting.copy_bytes / statistics.median(taken)


def ceilings(bench: Bench) -> None:
    """Copies, the chain of empty launches, and the products."""
    setting, record = bench.setting, bench.record
    again = copy_bandwidth(setting)
    record.add("ceiling", "copy", again, "B/s", note="read and written; again at this section")
    record.add("ceiling", "copy from pinned memory", _from_host(setting), "B/s", note="one way")
    _launches(bench)
    _products(bench)


def _from_host(setting: Setting) -> float:
    on_card = setting.device.type == "cuda"
    size = min(setting.copy_bytes, 1 << 28)
    source = torch.zeros(size, dtype=torch.uint8, pin_memory=on_card)
    target = torch.empty(size, dtype=torch.uint8, device=setting.device)
    taken = repeated(lambda: target.copy_(source, non_blocking=True), setting.repetitions, on_card)
    return 1e3 * size / statistics.median(taken)


def _launches(bench: Bench) -> None:
    """A launch without work, in a graph and started one by one."""
    setting = bench.setting
    on_card = setting.device.type == "cuda"
    count = _CHAIN if on_card else 3
    x = torch.zeros(16, device=setting.device)

    def chain() -> Tensor:
        for _ in range(count):
            _nothing[(1,)](x)
        return x

    graph = program_pool("triton").capture(chain)
    in_graph = statistics.median(repeated(graph.replay, setting.repetitions, on_card))
    eager = statistics.median(repeated(chain, setting.repetitions, on_card))
    note = f"{count} empty kernels, each behind the one before"
    bench.record.add("launch", "in a graph", 1e3 * in_graph / count, "us", note=note)
    bench.record.add("launch", "one by one", 1e3 * eager / count, "us", note=note)


def _products(bench: Bench) -> None:
    """x Wᵀ by the library, at the shapes of the patched weights and of the output head."""
    setting, model = bench.setting, bench.setting.model
    shapes = {weight.name: (weight.rows, weight.columns) for weight in model.weights}
    shapes["head"] = (model.vocabulary, model.hidden)
    cases = [(name, rows) for name in shapes for rows in setting.product_rows]
    for name, rows in bench.cases(cases):
        out, columns = shapes[name]
        weight = torch.randn(out, columns, device=setting.device).to(setting.dtype)
        x = torch.randn(rows, columns, device=setting.device).to(setting.dtype)
        taken = bench.timer.launched(partial(F.linear, x, weight))
        nbytes = setting.dtype.itemsize * (out * columns + rows * (out + columns))
        bench.record.add(
            "product", name, taken, "ms", model=model.name, rows=rows, nbytes=nbytes,
            note=f"{out} x {columns}, {2e-9 * rows * out * columns / taken:.3g} TFLOP/s",
        )  # fmt: skip
