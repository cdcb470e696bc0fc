"""What is run: ways to train (arms), each on a task and a seed, some after another; experiments.

All arms see the same examples in the same order, as often: one epoch of so many. What an arm does
besides, like a calibration, comes on top, as it does in its paper. Learning rates are chosen on
seed 0, whose examples no experiment uses: `python -m benchmarks.replication rates`. One rate serves
an arm's method at every density, rank and choice of targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

#: Training examples of a run, in batches of `BATCH`; one epoch.
EXAMPLES, BATCH = 640, 16
#: Examples that a run is judged on; never trained on.
HELD_OUT = 200
SEEDS = (1, 2, 3)
TASKS = ("reversal", "sections")
#: What a run is asked for under the name of the adapter that it begins with.
PARENT = "parent"


def _nothing() -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        name: in tables and in the results file; a new way gets a new name.
        method: of the trainer; empty for the base itself.
        parameters: of the method.
        settings: of the run, beyond the method's defaults.
        inherits: parameters by which it begins with another adapter, `PARENT`.
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=_nothing)
    settings: Mapping[str, Any] = field(default_factory=_nothing)
    inherits: Mapping[str, Any] = field(default_factory=lambda: {"init_from": PARENT})


@dataclass(frozen=True)
class Run:
    """An arm on a task with a seed, of the examples and of the training alike.

    Attributes:
        after: what it begins with; None: the base alone.
    """

    arm: Arm
    task: str
    seed: int
    after: Run | None = None

    @property
    def key(self) -> str:
        """`lotto-90@sections#1 after lota-90@reversal#1`: its lines in the results file."""
        own = f"{self.arm.name}@{self.task}#{self.seed}"
        return own if self.after is None else f"{own} after {self.after.key}"

    @property
    def judged(self) -> tuple[str, ...]:
        """The tasks that it is judged on: its own, and those that came before."""
        before = () if self.after is None else self.after.judged
        return (self.task, *before)

    def settings(self) -> dict[str, Any]:
        """For `TrainConfig.of`, all but the data."""
        parameters = {**self.arm.parameters}
        if self.after is not None:
            parameters |= self.arm.inherits
        return {
            "method": self.arm.method,
            "parameters": parameters,
            "seed": self.seed,
            "batch_size": BATCH,
            "value_dtype": "F32",
            **self.arm.settings,
        }


def _rate(value: float, optimizer: str = "adamw") -> dict[str, Any]:
    return {"learning_rate": value, "optimizer": optimizer}


#: Learning rates, by what is trained.
DENSE, LOTA, LORA, SPARTA, MCS = _rate(3e-4), _rate(3e-4), _rate(3e-3), _rate(8e-3), _rate(2e-3)

BASE = Arm("base", "")
CHOICE = Arm("base-choice", "")
FULL = Arm("full", "full", settings=DENSE)
LOTA_90 = Arm("lota-90", "lota", {"sparsity": 0.9}, LOTA, {
    "init_from": PARENT, "init_positions": "select",
})  # fmt: skip
LOTA_99 = replace(LOTA_90, name="lota-99", parameters={"sparsity": 0.99})
LOTA_99_STAR = replace(LOTA_90, name="lota-99*", parameters={"sparsity": 0.99, "iterations": 2})
LOTTO_90 = Arm("lotto-90", "lotto", {"sparsity": 0.9}, LOTA, {"parents": [PARENT]})


def lora(rank: int, targets: str) -> Arm:
    """LoRA, alpha twice the rank."""
    short = targets.replace(",", "").replace("all-linear", "all")
    parameters = {"rank": rank, "alpha": 2.0 * rank, "targets": targets}
    return Arm(f"lora-{rank}-{short}", "lora", parameters, LORA)


#: Parameters of a LoRA of rank 1 in all layers of SmolLM2-135M, by targets.
_PER_RANK = {"v,o": 57_600, "q,v": 57_600, "all-linear": 305_280}
#: Elements of all its linear weights.
_MODEL = 106_168_320


def sparta(rank: int, targets: str) -> Arm:
    """SpaRTA with as many values as LoRA of that rank has parameters."""
    short = targets.replace(",", "").replace("all-linear", "all")
    density = rank * _PER_RANK[targets] / _MODEL
    return Arm(f"sparta-{rank}-{short}", "sparta", {"density": density, "targets": targets}, SPARTA)


def lota_calibrated_on(fraction: float) -> Arm:
    """LoTA 90 % whose mask comes from a share of the examples."""
    parameters = {"sparsity": 0.9, "calibration_fraction": fraction}
    return replace(LOTA_90, name=f"lota-90-cal-{100 * fraction:g}%", parameters=parameters)


LOTA_RANDOM = replace(
    LOTA_90, name="lota-90-random", parameters={"sparsity": 0.9, "mask": "random"}
)


def mcs(score: str, sign: str = "") -> Arm:
    """MCS that selects in the first quarter of the epoch: after the warm-up, and once more."""
    name = f"mcs-{score}" if score != "mcs" else f"mcs-mcs{sign}"
    parameters = {"score": score, "warmup_steps": 5, "period": 10, "selection_epochs": 0.25}
    if score == "mcs":
        parameters["sign"] = sign
    return Arm(name, "mcs", parameters, MCS)


LORA_8 = lora(8, "all-linear")
SPARTA_MAIN = sparta(16, "v,o")
MCS_MAIN = mcs("mcs", "-")
#: (SpaRTA, LoRA) with as many parameters.
PAIRS = [(rank, targets) for targets in ("v,o", "q,v") for rank in (2, 16)] + [
    (1, "all-linear"), (3, "all-linear"),
]  # fmt: skip
MASKS = (lota_calibrated_on(0.1), lota_calibrated_on(0.01), LOTA_RANDOM)
SCORES = tuple(
    mcs(score, sign)
    for score, sign in (
        ("mcs", "+"), ("mcs", "-"), ("snip", ""), ("gradient", ""), ("magnitude", ""),
        ("grow_drop", ""),
    )
)  # fmt: skip
#: Pairs of an arm for the first task and one for the second, which begins with the first's result.
CHAINS = ((FULL, FULL), (LORA_8, LORA_8), (LOTA_90, LOTA_90), (LOTA_90, LOTTO_90))


def _each(arms: Iterable[Arm], seed: int) -> Iterator[Run]:
    for task in TASKS:
        for arm in arms:
            yield Run(arm, task, seed)


def _gains(seed: int) -> Iterator[Run]:
    yield from _each((BASE, CHOICE, SPARTA_MAIN, MCS_MAIN), seed)
    yield from _chains(((LOTA_90, LOTTO_90),), seed)


def _chains(chains: Sequence[tuple[Arm, Arm]], seed: int) -> Iterator[Run]:
    for first, second in (TASKS, TASKS[::-1]):
        for one, other in chains:
            parent = Run(one, first, seed)
            yield parent
            yield Run(other, second, seed, after=parent)


def _pairs(seed: int) -> Iterator[Run]:
    for task in TASKS:
        for rank, targets in PAIRS:
            yield Run(sparta(rank, targets), task, seed)
            yield Run(lora(rank, targets), task, seed)


#: Name → (seed) → its runs, parents in front of what comes after them.
EXPERIMENTS: Mapping[str, Callable[[int], Iterator[Run]]] = MappingProxyType({
    "gains": _gains,
    "forgetting": lambda seed: _chains(CHAINS, seed),
    "sparsity": lambda seed: _each((FULL, LORA_8, LOTA_90, LOTA_99, LOTA_99_STAR), seed),
    "masks": lambda seed: _each((LOTA_90, *MASKS), seed),
    "scores": lambda seed: _each(SCORES, seed),
    "sparta": _pairs,
})  # fmt: skip


def planned(experiments: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """Every run once, what comes after another right behind it."""
    seeds = tuple(seeds)
    found: dict[str, Run] = {}
    for name in experiments:
        for seed in seeds:
            found |= {run.key: run for run in EXPERIMENTS[name](seed)}
    children: dict[str, list[Run]] = {}
    for run in found.values():
        if run.after is not None:
            children.setdefault(run.after.key, []).append(run)
    return [
        each
        for run in found.values() if run.after is None
        for each in (run, *children.get(run.key, ()))
    ]  # fmt: skip


#: What was tried on seed 0: arm → (optimiser, rates).
TRIED: Sequence[tuple[Arm, str, tuple[float, ...]]] = (
    (MCS_MAIN, "adamw", (1e-3, 2e-3, 4e-3)),
    (mcs("mcs", "+"), "adamw", (1e-3, 2e-3)),
    (LOTA_90, "rmsprop", (1e-5, 4e-5, 1e-4, 2e-4)),
    (LOTA_90, "adamw", (1e-4, 3e-4, 6e-4)),
    (LOTA_99, "adamw", (3e-4, 1e-3, 3e-3)),
    (FULL, "adamw", (3e-5, 1e-4, 3e-4, 1e-3)),
    (SPARTA_MAIN, "adamw", (2e-3, 4e-3, 8e-3, 1.6e-2)),
    (LORA_8, "adamw", (1e-3, 3e-3, 1e-2)),
)


def tried(arm: Arm, optimizer: str, rate: float) -> Arm:
    """The arm with another rate."""
    settings = {**arm.settings, **_rate(rate, optimizer)}
    return replace(arm, name=f"{arm.name}~{optimizer}-{rate:g}", settings=settings)


def rate_runs() -> Iterator[Run]:
    """Every arm of `TRIED` at each of its rates."""
    for arm, optimizer, rates in TRIED:
        for rate in rates:
            for task in TASKS:
                yield Run(tried(arm, optimizer, rate), task, 0)
