"""The other systems on the same job, one process at a time, in the same rounds as ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.job import Job, Outcome
from benchmarks.peers.lora import write_lora
from benchmarks.peers.run import run_peer
from benchmarks.peers.setup import PEERS, Peer, ensure
from benchmarks.serving.engine import NEW_TOKENS, Bench
from benchmarks.serving.figures import Figure, Goal, Sample
from benchmarks.serving.throughput import ADAPTERS, RoundResult

GROUP = "Other systems, same job"
RATIOS = "gossamer against them"


@dataclass
class _Entry:
    """One system's two jobs and what is compared with each."""

    peer: Peer
    base: Figure
    lora: Figure
    comparisons: list[tuple[Figure, str | None]] = field(default_factory=list)


class Against:
    """vLLM and PEFT, base-only and with eight LoRA adapters."""

    def __init__(self, bench: Bench, folder: Path, threads: int) -> None:
        self._bench = bench
        table = bench.library.target.table
        self._adapters = []
        parameters = 0
        for i in range(ADAPTERS):
            parameters = write_lora(folder / f"lora-{i}", bench.base.path, table, seed=i)
            self._adapters.append(str(folder / f"lora-{i}"))
        size = sum(rows * columns for rows, columns in table.values())
        #: Of the LoRA adapters, as a density: what an element adapter of equal parameters has.
        self.share = parameters / size
        self._threads = threads
        self._entries = [self._entry(peer) for peer in PEERS.values()]
        self.versions: dict[str, str] = {}
        for entry in self._entries:
            ensure(entry.peer)

    def run_round(self, ours: RoundResult) -> None:
        """Each system twice, each time in a fresh process."""
        for entry in self._entries:
            base = self._run(entry.peer, [])
            lora = self._run(entry.peer, self._adapters)
            rate = {None: base.tokens / base.seconds, "": lora.tokens / lora.seconds}
            entry.base.samples.append(Sample(rate[None], foreign=base.foreign))
            entry.lora.samples.append(Sample(rate[""], rate[""] / rate[None], lora.foreign))
            for figure, key in entry.comparisons:
                mine = ours.base if key is None else ours.rates[key]
                theirs = rate[None] if key is None else rate[""]
                foreign = base.foreign if key is None else lora.foreign
                figure.samples.append(Sample(mine, mine / theirs, foreign))
            self.versions[entry.peer.label] = base.versions

    def figures(self) -> list[Figure]:
        """All, in the order of the tables."""
        measured = [f for entry in self._entries for f in (entry.base, entry.lora)]
        return measured + [f for entry in self._entries for f, _ in entry.comparisons]

    def notes(self) -> list[str]:
        """What a reader of the tables must know and they do not show."""
        equal = f"A LoRA adapter of rank 8 has the parameters of {self.share:.1%} element density."
        return [equal, *(f"{label}: {found}." for label, found in self.versions.items())]

    def _entry(self, peer: Peer) -> _Entry:
        def compared(key: str | None, name: str, goal: Goal | None) -> tuple[Figure, str | None]:
            with_ = "base only" if key is None else "8 LoRA r=8"
            return Figure(RATIOS, name, "tok/s", f"{peer.label}, {with_}", goal=goal), key

        vllm = peer.name == "vllm"
        entry = _Entry(
            peer,
            Figure(GROUP, f"{peer.label}, base only", "tok/s"),
            Figure(GROUP, f"{peer.label}, {ADAPTERS} LoRA r=8", "tok/s", "its base-only"),
        )
        entry.comparisons = [
            compared(None, "base only", Goal(">=", 1.25) if vllm else None),
            compared("element 1", "8 adapters, 1 %", Goal(">=", 2.4) if vllm else None),
            compared("element 2.3", "8 adapters, 2.3 %", Goal(">=", 2.2) if vllm else None),
        ]
        return entry

    def _run(self, peer: Peer, adapters: list[str]) -> Outcome:
        job = Job(
            model=str(self._bench.base.path),
            prompts=self._bench.prompts,
            new_tokens=NEW_TOKENS,
            threads=self._threads,
            adapters=adapters,
        )
        return run_peer(peer, job)
