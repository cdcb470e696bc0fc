"""Decode steps of whole models under graphs: base-only, and with distinct adapters in the rows."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.deltas import Kind, row_slots
from benchmarks.gpu.inside import Applied, Inside
from benchmarks.gpu.served import adapter, engine_of, key_of, one_entry
from benchmarks.gpu.timing import repeated
from benchmarks.roofline.models import Model
from gossamer.engine.scheduler import Work


class BaseRowsDifferError(Exception):
    """Rows without adapters got other logits because their neighbours have some."""

    def __init__(self, elements: int) -> None:
        super().__init__(f"{elements} logits of base rows have other bits")
        self.elements = elements


class NothingAppliedError(Exception):
    """Rows with adapters got the base's logits."""


class Steps:
    """Times the steps of one engine and writes their lines."""

    def __init__(self, bench: Bench, inside: Inside, model: Model, int8: bool) -> None:
        self._bench = bench
        self._inside = inside
        self._model = model
        setting = bench.setting
        self.coding = setting.codings[int8]
        self.context = setting.contexts[0]
        self._on_card = setting.device.type == "cuda"
        self.work = inside.decoding(max(setting.rows), self.context)
        self.base: dict[int, float] = {}

    def time(self, work: Sequence[Work], applied: Sequence[Applied]) -> float:
        """The median step, in milliseconds. The host runs ahead, so its work does not count as long
        as it is less."""
        for _ in range(2 if self._on_card else 1):  # captures, then settles
            self._inside.step(work, applied)
        taken = repeated(
            lambda: self._inside.step(work, applied), self._bench.setting.steps, self._on_card
        )
        return statistics.median(taken)

    def measure_base(self) -> None:
        """Without adapters; at the end once more, to see a drift."""
        for rows in self._bench.setting.rows:
            taken = self.time(self.work[:rows], [()] * rows)
            if rows in self.base:
                note = f"{self.base[rows] / taken:.3f} of the first time"
                self._add("step again", taken, rows, 0, 0.0, note=note)
            else:
                self.base[rows] = taken
                self._add("step", taken, rows, 0, 0.0)

    def measure(self, density: float) -> None:
        """All numbers of adapters of one density."""
        bench, setting = self._bench, self._bench.setting
        counts = [count for count in setting.adapters if setting.fits(count, density)]
        keys = [key_of("decode", density, i) for i in range(max(counts))]
        kind = Kind(density, self.coding)
        made = adapter(bench, self._inside, self._model, kind)
        nbytes = self._inside.keep(keys, made)
        for count in bench.cases(counts):
            if count * (nbytes + self._inside.page_bytes) > self._inside.room:
                bench.leave_out()
                continue
            seconds = self._inside.load(keys[:count])
            if count == 1:
                bench.record.add("load", "load", 1e3 * seconds, "ms", model=self._model.name,
                                 adapters=1, density=density, coding=self.coding, nbytes=0,
                                 note=f"{nbytes / 1e6:.4g} MB, by the engine's loader")  # fmt: skip
            for rows in setting.rows:
                taken = self.time(self.work[:rows], applied(keys[:count], rows))
                note = f"{self.base[rows] / taken:.3f} of base-only"
                self._add("step", taken, rows, count, density, note=note)

    def measure_launches(self, density: float) -> None:
        """What the deltas' launches cost when they have nothing to do; and steps without graphs."""
        setting = self._bench.setting
        key = key_of("one entry")
        self._inside.keep([key], one_entry(self._inside, self._model, Kind(density, self.coding)))
        self._inside.load([key])
        for rows in setting.rows:
            base = self.time(self.work[:rows], [()] * rows)
            idle = self.time(self.work[:rows], applied([key], rows))
            self._bench.record.add(
                "launch", "a step's deltas", idle - base, "ms", model=self._model.name, rows=rows,
                adapters=1, coding=self.coding, context=self.context,
                note="a step with one entry in every weight, less the base-only step",
            )  # fmt: skip
        rows = setting.rows[0]
        with self._inside.without_graphs():
            base = self.time(self.work[:rows], [()] * rows)
            idle = self.time(self.work[:rows], applied([key], rows))
        self._add("step without a graph", base, rows, 0, 0.0)
        self._add("step without a graph, one entry", idle, rows, 1, 0.0)

    def check_base_rows(self, density: float) -> None:
        """Every other row with an adapter: the others' logits keep their bits.

        Raises:
            BaseRowsDifferError, NothingAppliedError
        """
        rows = self._bench.setting.rows[0]
        key = key_of("decode", density, 0)
        self._inside.load([key])
        mixed: list[Applied] = [((key, 1.0),) if row % 2 else () for row in range(rows)]
        alone = self._inside.step(self.work[:rows], [()] * rows).clone().cpu()
        beside = self._inside.step(self.work[:rows], mixed).clone().cpu()
        other = _other_bits(alone[::2], beside[::2])
        self._bench.record.add(
            "identity", "logits of base rows with other bits", other, "elements",
            model=self._model.name, rows=rows, adapters=1, density=density, coding=self.coding,
            note=f"of {alone[::2].numel()}, every other row with an adapter",
        )  # fmt: skip
        if not _other_bits(alone[1::2], beside[1::2]):
            raise NothingAppliedError
        if other:
            raise BaseRowsDifferError(other)

    def _add(
        self, what: str, taken: float, rows: int, adapters: int, density: float, note: str = ""
    ) -> None:
        rate = f"{1e3 * rows / taken:.4g} tok/s"
        self._bench.record.add(
            "decode", what, taken, "ms", model=self._model.name, rows=rows, adapters=adapters,
            density=density, coding=self.coding if density else "", context=self.context,
            note=", ".join(filter(None, (rate, note))),
        )  # fmt: skip


def applied(keys: Sequence[str], rows: int) -> list[Applied]:
    """What each row adds, all with weight 1."""
    return [
        tuple((keys[slot], 1.0) for slot in sorted(slots)) for slots in row_slots(rows, len(keys))
    ]


def _other_bits(left: Tensor, right: Tensor) -> int:
    return int((left.view(torch.int32) != right.view(torch.int32)).sum())


def decode(bench: Bench) -> None:
    """Each model with each coding; the first of both with everything, also what launches cost."""
    cases = list(itertools.product(bench.setting.models, (False, True)))
    for model, int8 in bench.cases(cases):
        _of_model(bench, model, int8, (model, int8) == cases[0])


def _of_model(bench: Bench, model: Model, int8: bool, with_launches: bool) -> None:
    setting = bench.setting
    with engine_of(bench, model, int8=int8) as engine:
        steps = Steps(bench, Inside(engine), model, int8)
        steps.measure_base()
        # The targets' density first, for the case that time runs out.
        first = setting.step_densities[min(1, len(setting.step_densities) - 1)]
        rest = [density for density in setting.step_densities if density != first]
        for density in bench.cases([first, *rest]):
            steps.measure(density)
        steps.measure_base()
        if with_launches:
            steps.measure_launches(first)
        steps.check_base_rows(first)
