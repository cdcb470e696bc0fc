"""What a mix can be refused for."""

from __future__ import annotations

from typing import Literal

#:   unknown_merge_method  no such method
#:   invalid_mix           a weight, a parameter or the number of members breaks a rule
#:   base_model_mismatch   the members were made for different bases, or disagree about a shape
MixCode = Literal["unknown_merge_method", "invalid_mix", "base_model_mismatch"]


class MixError(ValueError):
    """A mix that cannot be; the server answers 400 and names the field.

    Attributes:
        code: the machine-readable reason.
        message: one sentence for the user.
        field: which part of the mix: `method`, `members`, `members[2].weight`, `params.lambda`.
    """

    def __init__(self, code: MixCode, message: str, *, field: str) -> None:
        super().__init__(message)
        self.code: MixCode = code
        self.message = message
        self.field = field


class MissingMemberError(LookupError):
    """A mix was compiled without the deltas of one of its members: the caller's mistake.

    Attributes:
        digest: of the missing member.
    """

    def __init__(self, digest: str) -> None:
        super().__init__(f"no deltas given for member {digest}")
        self.digest = digest
