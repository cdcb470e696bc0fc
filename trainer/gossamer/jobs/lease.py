"""A worker's side of a claim: when to send a heartbeat, and when to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from gossamer.jobs.backlog import Backlog
from gossamer.jobs.views import Claim, Order, Progress

#: the share of a lease after which the next heartbeat is due: two may fail before it ends
HEARTBEAT_SHARE = 1 / 3


class Lease:
    """A claim and the time that is left of it, by a clock that nobody can set.

    The time is counted from before the request that granted it was sent, so the worker never
    believes in a lease that others see ended. Not thread-safe: one thread beats.
    """

    def __init__(
        self,
        backlog: Backlog,
        claim: Claim,
        lease_s: float,
        *,
        since: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.claim = claim
        self._backlog = backlog
        self._lease_s = lease_s
        self._clock = clock
        self._since = since

    @classmethod
    def take(
        cls,
        backlog: Backlog,
        worker: str,
        lease_s: float,
        *,
        base_fingerprint: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self | None:
        """Claim a job; None if there is none.

        Raises:
            RegistryBusy
        """
        since = clock()
        claim = backlog.claim(worker, lease_s, base_fingerprint=base_fingerprint)
        if claim is None:
            return None
        return cls(backlog, claim, lease_s, since=since, clock=clock)

    def beat(self, progress: Progress | None = None) -> Order:
        """Send a heartbeat; what the tenant wants.

        Raises:
            LeaseLost: the job is another's, or ended.
            RegistryBusy: it was not sent; the lease runs on as before.
        """
        since = self._clock()
        order = self._backlog.heartbeat(self.claim, self._lease_s, progress)
        self._since = since
        return order

    def look(self) -> Order:
        """What the tenant wants, without a heartbeat: nothing is written, and nobody waits.

        Raises:
            LeaseLost: the job is another's, or ended.
            RegistryBusy
        """
        return self._backlog.wanted(self.claim)

    @property
    def remaining_s(self) -> float:
        """Seconds left, never below 0. At 0 the job may be another's: stop, or beat and see."""
        return max(0.0, self._since + self._lease_s - self._clock())

    @property
    def is_due(self) -> bool:
        """Whether it is time for a heartbeat."""
        return self._clock() >= self._since + self._lease_s * HEARTBEAT_SHARE
