"""What crosses the engine's border: a request in, messages out.

A request may have several choices (`Sampling.n`). Its messages arrive in this order:
`PromptScored` (only when asked for), then for every choice any number of `Chunk` and one
`ChoiceEnd`, interleaved between choices, and at last exactly one final message: `Done` or `Failed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from gossamer.merge import BASE, Mix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gossamer.engine.errors import EngineError


class Constraint(Protocol):
    """What the tokens of one choice must obey; its state moves with the choice."""

    def fill_mask(self, allowed: NDArray[np.bool_]) -> None:
        """Set allowed[token] for every token (bool [vocab_size]) that may come next."""

    def accept(self, token: int) -> None:
        """Move past `token`, which the mask allowed."""

    def is_finished(self) -> bool:
        """Whether nothing but the end of the text may follow."""


@dataclass(frozen=True)
class Sampling:
    """How a choice's tokens are drawn and where it ends.

    Attributes:
        max_tokens: most new tokens; 0 only scores the prompt.
        temperature: 0 is greedy.
        top_k: 0 is off. min_p: 0 is off. top_p: 1 is off.
        repetition_penalty: over prompt and output (1 is off), as in CTRL (arXiv:1909.05858).
        presence_penalty, frequency_penalty: over the output (0 is off), as OpenAI defines them.
        logit_bias: token → added to its logit.
        allowed_token_ids: when given, every other token is impossible.
        seed: the draw at a position is a function of (seed, choice index, position) alone.
        stop: strings; the text ends before the first of them, wherever its tokens begin.
        min_tokens: before that many, neither end-of-sequence nor a stop token can be drawn.
        logprobs: None, or how many alternatives beside the chosen token are reported.
        prompt_logprobs: the same for the prompt's tokens (switches prefix reuse off).
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        id: unique among the requests in flight.
        prompt: token ids, at least one.
        mix: members named by digest; the empty mix is the base.
        salt: keeps prefix sharing inside one tenant.
        constraint: makes a fresh constraint for one choice.
        priority: lower runs earlier among the waiting; equal ones by arrival.
    """

    id: str
    prompt: tuple[int, ...]
    mix: Mix = BASE
    sampling: Sampling = field(default_factory=Sampling)
    salt: bytes = b""
    constraint: Callable[[], Constraint] | None = None
    priority: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """The natural log-probability of `token` before temperature, and the likeliest alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptScored:
    """Log-probabilities of the prompt's tokens; the first has none (None)."""

    tokens: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True)
class Chunk:
    """New tokens of a choice, and the text that is certain by now (may be empty)."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ChoiceEnd:
    """The last of a choice. `matched` is the stop string or stop token that ended it, if any."""

    index: int
    reason: Literal["stop", "length"]
    matched: str | int | None = None


@dataclass(frozen=True)
class Done:
    """The final message of a request that was answered."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Failed:
    """The final message of a request that could not be answered."""

    error: EngineError


Message = PromptScored | Chunk | ChoiceEnd | Done | Failed
#: Called from the engine's thread, in order; must return at once and never raise.
Deliver = Callable[[Message], None]
