"""A request in flight: its choices, and what is delivered for it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from gossamer.engine.errors import EngineError
from gossamer.engine.messages import (
    ChoiceEnd,
    Chunk,
    Deliver,
    Done,
    Failed,
    PromptScored,
    Request,
    TokenLogprob,
)
from gossamer.engine.pages import PrefixKey
from gossamer.engine.sampler import Chooser, Drawn, score
from gossamer.engine.sequence import Sequence
from gossamer.engine.text import Decoder, TextStream


@dataclass(eq=False)
class Choice:
    """A sequence with the rules that draw its tokens and the text they make."""

    sequence: Sequence
    chooser: Chooser
    text: TextStream
    ended: bool = False


@dataclass(eq=False)
class Group:
    """All choices of one request. Delivers every message, the final one exactly once."""

    request: Request
    deliver: Deliver
    choices: list[Choice]
    eos: frozenset[int]
    _scores: list[TokenLogprob | None] = field(default_factory=list)
    failed: bool = False
    _final: bool = False

    @classmethod
    def of(
        cls,
        request: Request,
        deliver: Deliver,
        decoder: Decoder,
        eos: frozenset[int],
        vocab_size: int,
        root: PrefixKey | None,
        now: float,
    ) -> Group:
        """Lay out the choices of a request."""
        s = request.sampling
        seed = s.seed if s.seed is not None else secrets.randbits(62)
        stops = frozenset(s.stop_token_ids) | (frozenset() if s.ignore_eos else eos)
        choices: list[Choice] = []
        for index in range(s.n):
            leader = choices[0].sequence if choices else None
            choices.append(
                Choice(
                    Sequence(request, index, root, now, leader=leader),
                    Chooser(
                        s,
                        index,
                        seed,
                        stops,
                        request.prompt,
                        vocab_size,
                        request.constraint() if request.constraint else None,
                    ),
                    TextStream(
                        decoder, request.prompt, s.skip_special_tokens, s.stop, s.include_stop
                    ),
                )
            )
        return cls(request, deliver, choices, eos)

    @property
    def over(self) -> bool:
        """Whether the final message has gone out."""
        return self._final

    def score_prompt(self, work_start: int, rows: Tensor) -> None:
        """Take logits [count, vocab] of prompt tokens from `work_start`; deliver the whole."""
        alternatives = self.request.sampling.prompt_logprobs
        prompt = self.request.prompt
        if alternatives is None or len(self._scores) >= len(prompt):
            return
        if not self._scores:
            self._scores.append(None)
        for offset, row in enumerate(rows):
            following = work_start + offset + 1
            if following == len(self._scores) and following < len(prompt):
                self._scores.append(score(row, prompt[following], alternatives))
        if len(self._scores) == len(prompt):
            self.deliver(PromptScored(tuple(self._scores)))

    def take(self, choice: Choice, drawn: Drawn) -> None:
        """A token was drawn for a choice: extend it, deliver the text, end it if it is time."""
        s = self.request.sampling
        token, sequence = drawn.token, choice.sequence
        sequence.tokens.append(token)
        choice.chooser.accept(token)
        is_eos = token in self.eos and not s.ignore_eos
        is_stop = token in s.stop_token_ids
        text, matched = "", None
        if not (is_eos or is_stop) or (is_stop and s.include_stop):
            may_stop = sequence.output_length >= s.min_tokens
            text, matched = choice.text.push(token, may_stop=may_stop)
        finished = choice.chooser.constraint is not None and choice.chooser.constraint.is_finished()
        ended = is_eos or is_stop or finished or matched is not None or sequence.remaining <= 0
        if ended and matched is None:
            rest, matched = choice.text.finish()
            text += rest
        logprobs = (drawn.logprob,) if drawn.logprob is not None else ()
        self.deliver(Chunk(choice.sequence.index, text, (token,), logprobs))
        if ended:
            by_stop = is_eos or is_stop or finished or matched is not None
            by_what = matched if matched is not None else token if is_stop else None
            self.end(choice, "stop" if by_stop else "length", by_what)

    def end(
        self, choice: Choice, reason: Literal["stop", "length"], matched: str | int | None = None
    ) -> None:
        """End a choice; with the last of them the request is done."""
        choice.ended = True
        self.deliver(ChoiceEnd(choice.sequence.index, reason, matched))
        if all(c.ended for c in self.choices):
            self._final = True
            drawn = sum(c.sequence.output_length for c in self.choices)
            cached = self.choices[0].sequence.cached_tokens
            self.deliver(Done(len(self.request.prompt), drawn, cached))

    def fail(self, error: EngineError) -> None:
        """Deliver the failure as the final message, unless one has gone out."""
        if not self._final:
            self._final = self.failed = True
            self.deliver(Failed(error))
