"""What the kernels refuse, as exceptions that carry their data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gossamer.kernels.scatter import Saved


class KernelError(Exception):
    """Base of everything that this package raises on purpose."""


class ShapeError(KernelError, ValueError):
    """A tensor has the wrong shape, dtype, layout or device.

    Attributes:
        name: the argument.
        expected: what it should have been, in words.
        got: what it was, in words.
    """

    def __init__(self, name: str, expected: str, got: object) -> None:
        super().__init__(f"{name} must be {expected}, got {got}")
        self.name = name
        self.expected = expected
        self.got = str(got)


class PackError(KernelError, ValueError):
    """A piece of a delta cannot be placed inside its patched weight.

    Attributes:
        piece: index of the piece in the sequence given to `pack`.
        position: index into the piece's `positions`, or None when the piece as a whole is wrong.
        reason: why, in words.
    """

    def __init__(self, piece: int, position: int | None, reason: str) -> None:
        where = f"piece {piece}" if position is None else f"piece {piece}, position {position}"
        super().__init__(f"{where}: {reason}")
        self.piece = piece
        self.position = position
        self.reason = reason


class IndexRangeError(KernelError, IndexError):
    """An index tensor points outside the memory that it addresses; nothing was read or written
    through the bad entry.

    Attributes:
        name: the index tensor (or tensors) at fault.
        limit: the exclusive upper bound that was passed.
    """

    def __init__(self, name: str, limit: int) -> None:
        super().__init__(f"{name} points outside [0, {limit})")
        self.name = name
        self.limit = limit


class NotCapturableError(KernelError, RuntimeError):
    """A function cannot be recorded as a program.

    Attributes:
        operation: what it did besides launching kernels.
    """

    def __init__(self, operation: str) -> None:
        super().__init__(f"a program of kernels cannot hold {operation}")
        self.operation = operation


class BackendUnavailableError(KernelError, RuntimeError):
    """The chosen backend cannot run in this process.

    Attributes:
        backend: the backend asked for.
        reason: what is missing.
    """

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"kernel backend {backend!r} is not available: {reason}")
        self.backend = backend
        self.reason = reason


class NotRestoredError(KernelError):
    """Fusing failed, and so did undoing it: some weights hold a part of the mix.

    Attributes:
        saved: of which `restore` may be tried again.
    """

    def __init__(self, saved: Saved) -> None:
        super().__init__("weights are partly fused, and could not be restored")
        self.saved = saved
