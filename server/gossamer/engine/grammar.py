"""Structured output: what a text must match, as a mask over the vocabulary at every step.

The parser is llguidance's (https://github.com/guidance-ai/llguidance): an Earley parser over a
lexer of regular-expression derivatives. It is imported when the first tokenizer is prepared.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gossamer.engine.errors import InvalidRequest
from gossamer.engine.grammar_sandbox import LIMITS, Kind, Refused, Sandbox, explain
from gossamer.engine.messages import Constraint

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

#: Bytes of a schema, a regex, a grammar or all options together. Compiling is quadratic at worst.
MAX_SOURCE_BYTES = 64 << 10
#: CPU seconds that one choice may take for its masks: once, and for every token. A JSON object
#: takes 10 to 100 µs a token; an ambiguous grammar may take seconds, in everybody's thread.
_PATIENCE_S = 0.25
_PATIENCE_PER_TOKEN_S = 0.005


@dataclass(frozen=True)
class Json:
    """A JSON value of a JSON schema; any JSON object when there is none."""

    schema: dict[str, Any] | None = None


@dataclass(frozen=True)
class Regex:
    """A text that a regular expression matches from end to end (syntax of Rust's `regex`)."""

    pattern: str


@dataclass(frozen=True)
class Choice:
    """One of some texts."""

    options: Sequence[str]


@dataclass(frozen=True)
class Grammar:
    """A text of a context-free grammar, in Lark's or GBNF's syntax."""

    text: str


Spec = Json | Regex | Choice | Grammar
#: Makes a fresh constraint for one choice.
ConstraintFactory = Callable[[], Constraint]


@dataclass(frozen=True)
class TokenizerInfo:
    """A vocabulary in the form that constraints work on. Make one per tokenizer: `tokenizer_info`.

    Attributes:
        vocab_size: of the model.
        eos: tokens that end a text.
        tokenizer: llguidance's; None when it cannot use the tokenizer, for the reason `problem`.
        sandbox: where grammars are compiled first.
    """

    vocab_size: int
    eos: frozenset[int]
    tokenizer: Any
    problem: str
    sandbox: Sandbox


def tokenizer_info(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos: Iterable[int] | None = None
) -> TokenizerInfo:
    """Prepare a tokenizer; 0.3 s for 49 152 tokens.

    Args:
        vocab_size: of the model. Ids that the tokenizer does not have are never allowed.
        eos: tokens that end a text; by default the tokenizer's own.
    """
    import llguidance.hf

    own = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    ends = frozenset(own if eos is None else eos)
    specials = {
        token: str(added)
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special
    }
    prepared, problem = None, "" if ends else "its tokenizer has no end-of-text token"
    if ends:
        try:
            prepared = llguidance.hf.from_tokenizer(
                cast(Any, tokenizer),
                n_vocab=max(vocab_size, len(tokenizer)),
                eos_token=sorted(ends),
            )
        except ValueError as error:
            problem = explain(str(error))
    return TokenizerInfo(vocab_size, ends, prepared, problem, Sandbox(specials, vocab_size))


def compile_constraint(
    info: TokenizerInfo, spec: Spec, *, field: str | None = None
) -> ConstraintFactory:
    """What makes a fresh constraint for each choice of a request.

    Takes 2 to 50 ms, at most `grammar_sandbox.WALL_SECONDS` and once more as much CPU time as that
    allows; meant for a worker thread.

    Args:
        field: of the request, named in errors; by default `structured_outputs.<kind>`.

    Raises:
        InvalidRequest: not a schema, regex, list or grammar; or one that uses what is not
            supported, that nothing satisfies, or that costs too much.
    """
    kind, source = _source(spec)
    field = field or f"structured_outputs.{kind}"
    if info.tokenizer is None:
        raise InvalidRequest(field, f"This base has no structured output: {info.problem}.")
    try:
        size = len(source.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(field, f"The {_NAMES[kind]} is not valid Unicode.") from error
    if size > MAX_SOURCE_BYTES:
        raise InvalidRequest(
            field, f"The {_NAMES[kind]} has {size} bytes; at most {MAX_SOURCE_BYTES} are allowed."
        )
    compiled = info.sandbox.compile(kind, source)
    if isinstance(compiled, Refused):
        raise _refusal(field, kind, compiled.message)
    return _factory(info, field, kind, compiled)


_NAMES = {"json": "schema", "regex": "regex", "choice": "list of options", "grammar": "grammar"}


def _source(spec: Spec) -> tuple[Kind, str]:
    try:
        match spec:
            case Json(schema):
                return "json", json.dumps({"type": "object"} if schema is None else schema)
            case Regex(pattern):
                return "regex", pattern
            case Choice(options):
                if not options or not all(isinstance(o, str) and o for o in options):
                    raise InvalidRequest(
                        "structured_outputs.choice", "Give at least one option, none of them empty."
                    )
                return "choice", json.dumps(list(options))
            case Grammar(text):
                if not text.strip():
                    raise InvalidRequest("structured_outputs.grammar", "The grammar is empty.")
                return "grammar", text
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            "structured_outputs.json", "The schema is not JSON, or is nested too deeply."
        ) from error


def _factory(info: TokenizerInfo, field: str, kind: Kind, grammar: str) -> ConstraintFactory:
    from llguidance import LLMatcher, LLParserLimits

    template = LLMatcher(info.tokenizer, grammar, limits=LLParserLimits(**LIMITS), log_level=0)
    # The first mask shows whether anything can be said at all; copies start with its work done.
    first = b"" if template.is_error() else template.compute_bitmask()
    if template.is_error():
        raise _refusal(field, kind, template.get_error())
    if not set(_tokens(first)) - info.eos:
        raise InvalidRequest(field, f"No text but the empty one satisfies the {_NAMES[kind]}.")
    return lambda: _Matching(template.deep_copy(), info.vocab_size, kind, field)


def _tokens(packed: bytes) -> list[int]:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
    tokens: list[int] = np.flatnonzero(bits).tolist()
    return tokens


def _refusal(field: str, kind: Kind, raw: str) -> InvalidRequest:
    if "NoExtension" in raw:
        return InvalidRequest(field, f"Nothing satisfies the {_NAMES[kind]}.")
    return InvalidRequest(field, f"The {_NAMES[kind]} cannot be used: {explain(raw)}.")


class _Matching:
    """One choice on its way through a grammar. Errors wait for the next mask: that is where the
    engine can still fail this request alone."""

    def __init__(self, matcher: Any, vocab_size: int, kind: Kind, field: str) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._kind: Kind = kind
        self._field = field
        self._allowance = _PATIENCE_S

    def fill_mask(self, allowed: NDArray[np.bool_]) -> None:
        """Set allowed[token] for every token that may come next, and only for those.

        Args:
            allowed: bool [vocab_size], overwritten.

        Raises:
            InvalidRequest: following the grammar has become too costly.
        """
        started = time.thread_time()
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._allowance += _PATIENCE_PER_TOKEN_S - (time.thread_time() - started)
        if self._matcher.is_error():
            raise _refusal(self._field, self._kind, self._matcher.get_error())
        if self._allowance < 0:
            raise InvalidRequest(
                self._field, "Following the grammar takes too long; make it less ambiguous."
            )
        bits = np.unpackbits(packed, count=self._vocab_size, bitorder="little")
        np.copyto(allowed, bits.view(np.bool_))

    def accept(self, token: int) -> None:
        """Move past `token`, which the mask allowed."""
        started = time.thread_time()
        self._matcher.consume_token(token)
        self._allowance -= time.thread_time() - started

    def is_finished(self) -> bool:
        """Whether nothing but the end of the text may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()
