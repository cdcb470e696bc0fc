"""The whole job at several loads of adapters, each run between two runs of the bare base."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.serving.adapters import Recipe, mix
from benchmarks.serving.engine import Bench, Timing
from benchmarks.serving.figures import Figure, Goal, Sample
from gossamer.merge import Mix

ADAPTERS = 8
OURS = "base-only"
GROUP = "16 rows × 64 new tokens, prefill included"

#: Kind, density in %, target for the ratio to base-only.
LOADS: tuple[tuple[str, float, Goal | None], ...] = (
    ("element", 0.05, None),
    ("element", 0.5, Goal(">=", 0.88)),
    ("element", 1.0, Goal(">=", 0.84)),
    ("element", 2.3, None),
    ("element", 10.0, Goal(">=", 0.5)),
    ("block", 1.0, None),
    ("block", 10.0, None),
)


@dataclass
class Case:
    """One load: which mixes the rows use, and what is known about it.

    Attributes:
        key: for those who compare with it: "element 1".
        mixes: row i uses mix i mod their number.
        members: digests of the adapters that a step reads.
    """

    key: str
    figure: Figure
    mixes: list[Mix]
    members: list[str]
    timings: list[Timing] = field(default_factory=list)


@dataclass(frozen=True)
class RoundResult:
    """What a round's base-only run and cases gave."""

    base: float
    rates: dict[str, float]


class Throughput:
    """All cases on one engine."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.base = Figure(GROUP, "base only", "tok/s")
        self.cases = [self._distinct(*load) for load in LOADS]
        one = bench.library.add(Recipe("element", 0.01, seed=700))
        four = bench.library.add_many(Recipe("element", 0.01, seed=800), 4)
        rows = range(len(bench.prompts))
        self.cases.append(
            Case(
                "fused",
                Figure(GROUP, "one 1 % adapter on all rows, fused", "tok/s", OURS, 1.0,
                       Goal(">=", 0.98)),
                [mix((one, 1.0))],
                [],
            )
        )  # fmt: skip
        # Each row weighs its members otherwise, so that no row can share another's mix and the
        # engine cannot fuse: this measures the kernels.
        self._single = Case(
            "single",
            Figure(GROUP, "one 1 % adapter, every row with a weight of its own", "tok/s", OURS),
            [mix((four[0], 0.5 + 0.01 * i)) for i in rows],
            four[:1],
        )
        self._merged = Case(
            "merged",
            Figure(GROUP, "a mix of four 1 % adapters, another in every row", "tok/s", OURS),
            [mix(*((name, 0.2 + 0.01 * (i + j)) for j, name in enumerate(four))) for i in rows],
            four,
        )
        self.cases += [self._single, self._merged]
        self.mixing = Figure(
            "Decode step", "mixes of four over one member", "ms", "one member",
            goal=Goal("<=", 1.3),
        )  # fmt: skip
        self.blocks = Figure(
            "Decode step", "what 8 element adapters of 10 % add, over block", "ms", "block",
            goal=Goal(">=", 1.5),
        )  # fmt: skip

    def warm_up(self) -> None:
        """Load every adapter and compile every kernel."""
        for case in self.cases:
            self._bench.job(case.mixes, new_tokens=2)
        self._bench.job(self.cases[0].mixes)
        self._bench.job()
        resident = self._bench.engine.resident()
        for case in self.cases:
            if case.members:
                added = sum(resident[name] for name in case.members)
                case.figure.predicted = 1 / (1 + added / self._bench.base_bytes)

    def run_round(self) -> RoundResult:
        """Base, case, base, case, …, base."""
        before = self._bench.job()
        self._add_base(before)
        rates = {}
        bases = [before]
        for case in self.cases:
            timing = self._bench.job(case.mixes)
            after = self._bench.job()
            self._add_base(after)
            # The bases on both sides: a drift of the machine cancels.
            rate = statistics.fmean([before.rate, after.rate])
            case.figure.samples.append(
                Sample(timing.rate, timing.rate / rate, timing.foreign, timing.step)
            )
            case.timings.append(timing)
            rates[case.key] = timing.rate
            before = after
            bases.append(after)
        self._compare_steps(statistics.median(t.step for t in bases))
        return RoundResult(statistics.median(t.rate for t in bases), rates)

    def figures(self) -> list[Figure]:
        """All, in the order of the table."""
        return [self.base, *(case.figure for case in self.cases), self.mixing, self.blocks]

    def notes(self) -> list[str]:
        """What a reader of the tables must know and they do not show."""
        fused = [
            timing.fused for case in self.cases if case.key == "fused" for timing in case.timings
        ]
        return [f"The fused case ran {statistics.median(fused):.0%} of its steps on fused weights."]

    def _distinct(self, kind: str, percent: float, goal: Goal | None) -> Case:
        seed = 100 + round(percent * 1000)
        recipe = Recipe("block" if kind == "block" else "element", percent / 100, seed)
        names = self._bench.library.add_many(recipe, ADAPTERS)
        tiles = ", 16 × 16 blocks" if kind == "block" else ""
        figure = Figure(
            GROUP, f"{ADAPTERS} adapters, {percent:g} %{tiles}", "tok/s", OURS, goal=goal
        )
        return Case(f"{kind} {percent:g}", figure, [mix((name, 1.0)) for name in names], names)

    def _add_base(self, timing: Timing) -> None:
        self.base.samples.append(Sample(timing.rate, foreign=timing.foreign, step=timing.step))

    def _compare_steps(self, base: float) -> None:
        one, many = self._single.timings[-1], self._merged.timings[-1]
        self.mixing.samples.append(
            Sample(1e3 * many.step, many.step / one.step, max(one.foreign, many.foreign))
        )
        last = {case.key: case.timings[-1] for case in self.cases}
        element, block = last["element 10"], last["block 10"]
        added = element.step - base
        self.blocks.samples.append(
            Sample(1e3 * added, added / (block.step - base), max(element.foreign, block.foreign))
        )


def rates(results: Sequence[RoundResult], key: str | None) -> list[float]:
    """A case's tokens per second by round; None: base-only."""
    return [result.base if key is None else result.rates[key] for result in results]
