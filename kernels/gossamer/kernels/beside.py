"""Launches beside others: a branch of the device's work that is joined where it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Branch:
    """A second stream of a device; on a CPU, what is launched beside is launched in turn.

    The branch begins behind everything launched so far, and `join` puts everything launched later
    behind it. So memory of either may be used by the other between the two, and freed after.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched inside runs beside what is launched after, until `join`."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched from now on waits for what was launched beside."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
