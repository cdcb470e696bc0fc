"""Where the process stands between its start and its end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class Lifecycle:
    """Set by `serve`, read by the gate and by the readiness route. Used in the event loop.

    Attributes:
        draining: new requests are refused, running ones go on.
    """

    draining: bool = False
