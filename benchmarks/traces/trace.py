"""What a trace says, and its file: a head, then one event a line, in the order of time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Head:
    """The first line of a trace's file.

    Attributes:
        trace: its name, which is the file's.
        about: what the workload is, in a sentence.
        seed: of the generator.
        adapters: how many adapters `a0`, `a1`, … a replay must have; all are there at the start.
        fit: how many of them the replay's memory budget must hold; all when None.
        rate: mean requests per second over the trace.
    """

    trace: str
    about: str
    seed: int
    adapters: int
    rate: float
    fit: int | None = None


@dataclass(frozen=True)
class Ask:
    """A request for a completion.

    Attributes:
        at: seconds since the start.
        tenant: who asks.
        model: `base`, an adapter `a3`, or a linear mix `a3*0.7+a8*0.3`.
        prompt_tokens, new_tokens: lengths; the prompt's tokens are the replay's to choose.
    """

    at: float
    tenant: str
    model: str
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Change:
    """Something that happens to an adapter between requests.

    Attributes:
        do: `upload` a new version, `unload` it from memory, or go `rollback` to the version before.
    """

    at: float
    do: Literal["upload", "unload", "rollback"]
    model: str


Event = Ask | Change


def render(head: Head, events: Iterable[Event]) -> str:
    """The text of a trace's file."""
    lines = [json.dumps(asdict(head))]
    lines += [json.dumps(asdict(event)) for event in events]
    return "\n".join(lines) + "\n"


def read(path: Path) -> tuple[Head, list[Event]]:
    """A trace from its file."""
    first, *rest = path.read_text().splitlines()
    events: list[Event] = []
    for line in rest:
        fields = json.loads(line)
        events.append(Change(**fields) if "do" in fields else Ask(**fields))
    return Head(**json.loads(first)), events
