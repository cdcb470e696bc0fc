"""Who may queue: the one place where a tenant's share of the server is checked.

Today these are bounds on what waits. Token quotas and fair shares belong here too: every request
takes a `Ticket` before any work is done for it, and gives it back when its last message has come.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gossamer.api.errors import rate_limited, unavailable
from gossamer.api.settings import Limits

#: how fast the estimate of a request's time follows the last ones
_SMOOTHING = 0.1


@dataclass(eq=False)
class Ticket:
    """One request's place: so many `sequences`, of which `waiting` have not begun."""

    admission: Admission
    tenant: str
    sequences: int
    waiting: int
    entered: float

    def begun(self, sequences: int) -> None:
        """So many of its sequences run now."""
        self.admission.begun(self, min(sequences, self.waiting))

    def leave(self) -> None:
        """The request has ended, however. May be called again."""
        self.admission.leave(self)


class Admission:
    """Counts what waits, for the server and for each tenant. Runs in the event loop only.

    Args:
        rows: sequences that the engine runs at once.
        limits: how much may wait.
        clock: seconds.
    """

    def __init__(
        self, rows: int, limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rows = rows
        self._limits = limits
        self._clock = clock
        self._waiting: Counter[str] = Counter()
        self._under_way = 0
        self._uploads: Counter[str] = Counter()
        self._increments: Counter[str] = Counter()
        self._inside: set[Ticket] = set()
        self._seconds = 1.0

    @property
    def waiting(self) -> int:
        """Sequences that have not begun, of all tenants."""
        return self._waiting.total()

    @property
    def inside(self) -> int:
        """Requests that have a ticket."""
        return len(self._inside)

    def enter(self, tenant: str, sequences: int) -> Ticket:
        """A place for a request with that many sequences under way at once.

        Raises:
            ApiError: 429 when the tenant's queue is full, 503 when the server's is.
        """
        # What fits the engine's rows does not wait, though it may not have begun yet.
        queued = self._under_way + sequences - self._rows
        mine = min(self._waiting[tenant] + sequences, queued)
        if mine > (most := self._limits.queued_per_tenant):
            raise rate_limited(
                f"This would make {mine} waiting sequences of yours, of at most {most}; "
                "retry when some have run.",
                self._retry_after(mine),
            )
        if queued > (most := self._limits.queued):
            raise unavailable(
                f"This would make {queued} waiting sequences, of at most {most}.",
                self._retry_after(queued),
            )
        ticket = Ticket(self, tenant, sequences, sequences, self._clock())
        self._waiting[tenant] += sequences
        self._under_way += sequences
        self._inside.add(ticket)
        return ticket

    def begun(self, ticket: Ticket, sequences: int) -> None:
        """Some of a ticket's sequences no longer wait."""
        ticket.waiting -= sequences
        self._waiting[ticket.tenant] -= sequences
        if not self._waiting[ticket.tenant]:
            del self._waiting[ticket.tenant]

    def leave(self, ticket: Ticket) -> None:
        """Take a ticket back."""
        if ticket not in self._inside:
            return
        self.begun(ticket, ticket.waiting)
        self._inside.remove(ticket)
        self._under_way -= ticket.sequences
        self._seconds += _SMOOTHING * (self._clock() - ticket.entered - self._seconds)

    @contextmanager
    def upload(self, tenant: str) -> Iterator[None]:
        """A place for an upload: what has arrived of it takes disk space until it is checked.

        Raises:
            ApiError: 429 or 503, too many of the tenant or of all are under way.
        """
        limits = self._limits
        with _one_of("uploads", self._uploads, tenant, limits.uploads_per_tenant, limits.uploads):
            yield

    @contextmanager
    def increment(self, tenant: str) -> Iterator[None]:
        """A place for an increment: it is made behind others', and then takes disk space until it
        is sent.

        Raises:
            ApiError: 429 or 503, too many of the tenant or of all are under way.
        """
        mine, all_ = self._limits.increments_per_tenant, self._limits.increments
        with _one_of("increments", self._increments, tenant, mine, all_):
            yield

    def _retry_after(self, waiting: int) -> float:
        """When about a quarter of what waits will have begun, at the pace of the last requests."""
        return max(0.25, self._seconds * waiting / (4 * self._rows))


@contextmanager
def _one_of(
    what: str, under_way: Counter[str], tenant: str, most_of_tenant: int, most: int
) -> Iterator[None]:
    if under_way[tenant] >= most_of_tenant:
        raise rate_limited(f"{most_of_tenant} {what} of yours are under way already.", 1.0)
    if under_way.total() >= most:
        raise unavailable(f"{most} {what} are under way already.", 1.0)
    under_way[tenant] += 1
    try:
        yield
    finally:
        under_way[tenant] -= 1
        if not under_way[tenant]:
            del under_way[tenant]
