"""What the sections share, and how they are run: each within its time, none at another's cost."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from benchmarks.gpu.deltas import Deltas
from benchmarks.gpu.record import Record
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Timer

Case = TypeVar("Case")


@dataclass
class Bench:
    """The run.

    Attributes:
        end: when the present section is to end, by `time.monotonic`.
        left_out: cases for which there was no time or no memory, by section.
    """

    setting: Setting
    record: Record
    timer: Timer
    deltas: Deltas
    end: float = 0.0
    section: str = ""
    left_out: dict[str, int] = field(default_factory=dict)

    def cases(self, cases: Iterable[Case]) -> Iterator[Case]:
        """Those for which there is time; the others are counted."""
        waiting = list(cases)
        for i, case in enumerate(waiting):
            if time.monotonic() > self.end:
                self.leave_out(len(waiting) - i)
                return
            yield case

    def leave_out(self, count: int = 1) -> None:
        """So many cases of this section are not measured."""
        self.left_out[self.section] = self.left_out.get(self.section, 0) + count

    @property
    def ended(self) -> bool:
        """Whether the section's time is over."""
        return time.monotonic() > self.end


class Section(NamedTuple):
    """A part of the run.

    Attributes:
        seconds: that it may take on a card; then it begins no other case.
        run: writes the lines.
    """

    name: str
    seconds: float
    run: Callable[[Bench], None]


def run_sections(bench: Bench, sections: Sequence[Section], end: float) -> list[str]:
    """Run them in their order; whatever one raises is printed, and the next one runs.

    Args:
        end: of all of them, by `time.monotonic`.

    Returns:
        the names of those that failed.
    """
    failed = []
    for section in sections:
        start = time.monotonic()
        bench.section = section.name
        bench.end = min(start + section.seconds, end)
        print(f"\n== {section.name}", flush=True)
        try:
            section.run(bench)
        except Exception:  # noqa: BLE001 - the report of the other sections is not to be lost
            traceback.print_exc()
            failed.append(section.name)
        gc.collect()
        if bench.setting.device.type == "cuda":
            torch.cuda.empty_cache()
        taken = time.monotonic() - start
        without = bench.left_out.get(section.name, 0)
        print(f"== {section.name}: {taken:.1f} s, {without} cases left out", flush=True)
    return failed
