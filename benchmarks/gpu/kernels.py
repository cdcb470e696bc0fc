"""The delta kernels against their bytes: entries, tiles, the copies of x; and layouts that lost."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.deltas import Kind, plan_of
from benchmarks.gpu.timing import Launch
from benchmarks.layouts.candidates import CANDIDATES, WIDTHS
from benchmarks.layouts.entries import random_entries
from benchmarks.layouts.layout import Layout, Packed, error
from benchmarks.layouts.timing import WrongResultError
from benchmarks.roofline.measured import entry_bytes
from benchmarks.roofline.models import MODELS, Weight
from benchmarks.roofline.step import chunks, width
from gossamer.kernels import BoundDeltas, WorkPlan, compute_terms
from gossamer.kernels.gpu.block import block
from gossamer.kernels.gpu.element import element
from gossamer.kernels.gpu.rows import transposed
from gossamer.kernels.tolerances import TOLERANCES


def entries(bench: Bench) -> None:
    """One launch of `element` over density, coding, rows and adapters, on each patched weight."""
    setting = bench.setting
    for density, coding in itertools.product(setting.densities, setting.codings):
        _bytes(bench, Kind(density, coding))
    weights = setting.model.weights
    loads = list(itertools.product(setting.kernel_rows, setting.kernel_adapters))
    # Large and small launches first: the target is by the bytes of a launch.
    for weight in (weights[2], weights[1], weights[0], weights[3]):
        kinds = [Kind(d, c) for d in setting.densities for c in setting.codings]
        for kind in bench.cases(kinds):
            most = max(a for _, a in loads if setting.fits(a, kind.density))
            bound = bench.deltas.bound(weight, kind, most)
            for rows, adapters in loads:
                if setting.fits(adapters, kind.density):
                    _launched(bench, weight, kind, bound, rows, adapters)


def _bytes(bench: Bench, kind: Kind) -> None:
    """Of an entry, as the packer writes them; all metadata counted."""
    model = bench.setting.model
    packed = [bench.deltas.host(weight, kind) for weight in model.weights]
    each = sum(delta.data.nbytes for delta in packed) / sum(delta.nnz for delta in packed)
    note = ""
    if model.name in MODELS and kind.coding != "float32":
        note = f"expected {entry_bytes(model, kind.density, kind.coding):.3f}"  # type: ignore[arg-type]
    bench.record.add("bytes", "entry", each, "B", model=model.name, density=kind.density,
                     coding=kind.coding, note=note)  # fmt: skip


def _launched(
    bench: Bench, weight: Weight, kind: Kind, bound: BoundDeltas, rows: int, adapters: int
) -> None:
    """The entries, or the tiles, which are added to what the entries left."""
    setting = bench.setting
    plan, weights = plan_of(rows, adapters, setting.device)
    x = torch.randn(rows, weight.columns, device=setting.device).to(setting.dtype)
    terms = torch.zeros(rows, weight.rows, dtype=torch.float32, device=setting.device)
    copies = transposed(x, plan)

    def products() -> Tensor:
        if kind.side:
            block(terms, copies, bound, plan, weights, kind.side)
        else:
            element(terms, copies, bound, plan, weights, bound.coding == "int8")
        return terms

    taken = bench.timer.launched(products)
    read = sum(d.data.nbytes for d in bound.deltas[:adapters] if d is not None)
    passes = 2 if kind.side else 1
    nbytes = read + _copied_bytes(bench, weight, rows, adapters) + passes * terms.nbytes
    bench.record.add(
        "block" if kind.side else "element",
        f"{weight.name} {kind.side}" if kind.side else weight.name, taken, "ms",
        model=setting.model.name, rows=rows, adapters=adapters, density=kind.density,
        coding=kind.coding, nbytes=nbytes, note=_reached(bench, nbytes, taken),
    )  # fmt: skip


def _copied_bytes(bench: Bench, weight: Weight, rows: int, adapters: int) -> int:
    """Of the copies of x, written once and read once by each program that needs them: counted
    once."""
    count = sum(width(some) for some, _ in chunks(rows, adapters))
    return count * weight.columns * bench.setting.dtype.itemsize


def _reached(bench: Bench, nbytes: float, milliseconds: float) -> str:
    share = 1e3 * nbytes / milliseconds / bench.record.copy_bandwidth
    over = 1e3 * (milliseconds - 1e3 * nbytes / bench.record.copy_bandwidth)
    return f"{nbytes / 1e6:.3g} MB at {share:.2f} of the copy; {over:.1f} us beyond"


def tiles(bench: Bench) -> None:
    """`block` by the side of the tiles, at as many entries as `element` has."""
    setting = bench.setting
    loads = list(itertools.product(setting.rows, setting.kernel_adapters))
    cases = itertools.product(setting.block_densities, (setting.model.weights[2],
                              setting.model.weights[1]), (0, *setting.sides))  # fmt: skip
    for density, weight, side in bench.cases(cases):
        kind = Kind(density, setting.coding, side)
        fitting = [(r, a) for r, a in loads if setting.fits(a, density)]
        bound = bench.deltas.bound(weight, kind, max(a for _, a in fitting))
        for rows, adapters in fitting:
            _launched(bench, weight, kind, bound, rows, adapters)


def copies(bench: Bench) -> None:
    """The copies of x by chunk, and both launches of the branch beside a product."""
    setting = bench.setting
    kind = Kind(setting.step_densities[0], setting.coding)
    loads = itertools.product(setting.model.weights[2:], setting.rows, setting.kernel_adapters)
    for weight, rows, adapters in bench.cases(loads):
        plan, weights = plan_of(rows, adapters, setting.device)
        x = torch.randn(rows, weight.columns, device=setting.device).to(setting.dtype)
        bound = bench.deltas.bound(weight, kind, adapters)
        found = {
            "copies": bench.timer.launched(partial(transposed, x, plan)),
            "copies and entries": bench.timer.launched(_terms(x, bound, plan, weights)),
        }
        nbytes = x.nbytes + _copied_bytes(bench, weight, rows, adapters)
        for what, taken in found.items():
            bench.record.add(
                "copies", f"{what} {weight.name}", taken, "ms", model=setting.model.name,
                rows=rows, adapters=adapters, density=kind.density, coding=kind.coding,
                nbytes=nbytes if what == "copies" else 0,
            )  # fmt: skip


def _terms(x: Tensor, bound: BoundDeltas, plan: WorkPlan, weights: Tensor) -> Launch:
    return lambda: compute_terms(x, bound, plan, weights).values


def layouts(bench: Bench) -> None:
    """The candidates of `benchmarks.layouts` on one weight, one delta, uniform masks."""
    setting = bench.setting
    weight = setting.model.weights[1]
    made = {density: random_entries((weight.rows, weight.columns), density, "uniform", 0)
            for density in setting.layout_densities}  # fmt: skip
    for layout, density in bench.cases(itertools.product(CANDIDATES, made)):
        packed = layout.pack(made[density])
        for count in WIDTHS:
            x = torch.randn(weight.columns, count, device=setting.device)
            narrow = layout.only_bfloat16 or setting.device.type == "cuda"
            x = x.to(torch.bfloat16) if narrow else x
            off = error(layout, packed, made[density], x)
            if off > TOLERANCES[torch.float32]:
                raise WrongResultError(layout.name, off)
            taken = bench.timer.launched(_candidate(layout, packed, x))
            nbytes = packed.nbytes + x.nbytes + 4 * packed.rows * count
            bench.record.add(
                "layout", layout.name, taken, "ms", model=setting.model.name, rows=count,
                adapters=1, density=density, nbytes=nbytes, note=_reached(bench, nbytes, taken),
            )  # fmt: skip


def _candidate(layout: Layout, packed: Packed, x: Tensor) -> Launch:
    arrays = packed.on(x.device)
    y = torch.empty(packed.rows, x.shape[1], device=x.device)
    variant = layout.variant(x.shape[1])
    arguments = (y, x, *arrays.values(), packed.rows, packed.columns, *packed.scalars)

    def launch() -> Tensor:
        variant.kernel[(len(packed.steps),)](*arguments, **variant.constants, **variant.options)
        return y

    return launch
