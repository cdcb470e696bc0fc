"""What the store's formats refuse, as exceptions that carry data.

`AdapterFileError` is about bytes or content that somebody handed in: the server answers 422 with
its code and message. `DeltaError` is about a delta that our own caller built wrongly, `ChainError`
about a version that should have parents and does not hold them.
"""

from __future__ import annotations

from typing import Literal

#: Why an adapter file is refused. The codes are part of the HTTP interface.
#:   invalid_adapter_file   not a well-formed packed adapter, or its content breaks a rule
#:   unsupported_file       another format (a pickle, an archive, another library's adapter)
#:   base_model_mismatch    made for another base model
#:   unsupported_module     changes something this server cannot apply (a norm, a bias, a head)
#:   adapter_too_large      over a configured limit, before anything was decoded
RefusalCode = Literal[
    "invalid_adapter_file",
    "unsupported_file",
    "base_model_mismatch",
    "unsupported_module",
    "adapter_too_large",
]


_SHOWN = 200


def printable(name: str) -> str:
    """A name from a file, fit for a message or a log line: no control characters, not too long."""
    clipped = name if len(name) <= _SHOWN else name[:_SHOWN] + "…"
    return clipped if clipped.isascii() and clipped.isprintable() else ascii(clipped)[1:-1]


class AdapterFileError(Exception):
    """An adapter file that is refused; nothing of it has been used.

    Attributes:
        code: the machine-readable reason.
        message: one sentence for the user.
        tensor: the weight, or the tensor of the file, that the refusal is about; clipped and
            escaped, because a hostile file chose it.
        position: the index into that weight's positions of the first offending entry.
    """

    def __init__(
        self,
        code: RefusalCode,
        message: str,
        *,
        tensor: str | None = None,
        position: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code: RefusalCode = code
        self.message = message
        self.tensor = None if tensor is None else printable(tensor)
        self.position = position


class ChainError(ValueError):
    """A version has no increment over its parents.

    Attributes:
        why: the rest of a sentence that begins with the version.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class DeltaError(ValueError):
    """A delta that breaks its own rules.

    Attributes:
        message: one sentence.
        tensor: the weight's name, where the delta has one.
        position: the index into the positions of the first offending entry, where there is one.
    """

    def __init__(
        self, message: str, *, tensor: str | None = None, position: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.tensor = tensor
        self.position = position
