"""The job of the comparison and its result, as they cross to another system's process.

Standard library only: every runner imports this inside its own environment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """Continue all prompts at once, greedily, each by exactly `new_tokens` tokens.

    Attributes:
        model: a Hugging Face directory with fp32 safetensors.
        prompts: token ids.
        adapters: LoRA directories; row i uses adapter i mod their number. None: the base only.
        threads: compute threads.
    """

    model: str
    prompts: list[list[int]]
    new_tokens: int
    threads: int
    adapters: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """New tokens over all rows."""
        return len(self.prompts) * self.new_tokens


@dataclass(frozen=True)
class Outcome:
    """One timed run of a job, after an untimed one that warmed the process up.

    Attributes:
        foreign: share of the machine that other processes used meanwhile.
        versions: of what ran.
        first: token ids of row 0, to see that systems agree.
    """

    seconds: float
    tokens: int
    foreign: float
    versions: str
    first: list[int]


def serve_job(run: Callable[[Job], Outcome]) -> None:
    """The main function of a runner: `python -m … JOB.json OUTCOME.json`."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    outcome = run(Job(**json.loads(source.read_text())))
    target.write_text(json.dumps(asdict(outcome)))


def check(job: Job, rows: list[list[int]]) -> None:
    """Every row has its tokens: a system that stopped early would look fast."""
    short = [i for i, row in enumerate(rows) if len(row) != job.new_tokens]
    if short or len(rows) != len(job.prompts):
        raise RuntimeError(f"{len(rows)} rows, too short or too long: {short}")
