"""A process that compiles grammars which strangers wrote, and may die of it.

llguidance counts most of what a grammar costs, but not all: schemas whose references form a chain
of a thousand end the process with a stack overflow, two thousand `patternProperties` are compared
pair by pair for minutes, and 64 KiB of `a*` took 4 GB. So every grammar is compiled here first,
under the system's own limits on CPU time and memory. What survives costs the server no more.

This module is both ends: `Sandbox` in the server, and the process itself (`python -m`), which reads
one JSON object a line and answers each with one.
"""

from __future__ import annotations

import json
import random
import re
import selectors
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass
from typing import IO, Any, Literal

from gossamer.engine.errors import Overloaded

Kind = Literal["json", "regex", "choice", "grammar"]

#: Of llguidance. Objects with 300 optional properties, enumerations of 3 000 strings and
#: `(\w+\s){50,200}` fit; each number is 2 to 4 times what the largest of them takes.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 60_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 20_000,
    # Eager work on the whole vocabulary; without it the first uses of a long regex cost 1 ms more.
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
CPU_SECONDS = 0.3
WALL_SECONDS = 1.5
_START_SECONDS = 30.0
MEMORY_BYTES = 512 << 20
#: The server's threads have at least four times as much.
_STACK_BYTES = 2 << 20
#: Tokens drawn at random after compiling, so that a grammar that costs too much soon shows it.
_STEPS = 24

#: One space, or one line break with its indentation: JSON allows any amount of both, and a small
#: model that may always write another space does.
_WHITESPACE = r"( |\n[ \t]{0,40})?"


@dataclass(frozen=True)
class Refused:
    """Why a grammar is not compiled; llguidance's words, or ours when it did not survive."""

    message: str


class Sandbox:
    """The server's end. Thread-safe; the process starts with the first call and is replaced when
    it dies.

    Args:
        specials: special tokens by id; grammars may name them.
        vocab_size: token ids that a grammar may name go up to this.
    """

    def __init__(self, specials: dict[int, str], vocab_size: int) -> None:
        self._hello = {"specials": specials, "vocab_size": vocab_size}
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def compile(self, kind: Kind, source: str) -> str | Refused:
        """The grammar in llguidance's own form, when it compiles within the limits.

        Raises:
            Overloaded: the process cannot be started.
        """
        with self._lock:
            if self._child is None:
                self._child = _Child(self._hello)
            answer = self._child.ask({"kind": kind, "source": source}, WALL_SECONDS)
            if answer is None:
                self._child.end()
                self._child = None
                return Refused("it takes more time or memory than one grammar may")
        if "error" in answer:
            return Refused(str(answer["error"]))
        return str(answer["grammar"])

    def close(self) -> None:
        """End the process; a later call starts another."""
        with self._lock:
            if self._child is not None:
                self._child.end()
                self._child = None


class _Child:
    def __init__(self, hello: dict[str, Any]) -> None:
        # -P keeps the working directory off its path; a session of its own, so that Ctrl-C in the
        # terminal reaches the server alone.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gossamer.engine.grammar_sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.end = weakref.finalize(self, _end, self._process)
        if self.ask(hello, _START_SECONDS) is None:
            self.end()
            raise Overloaded("The process that compiles grammars did not start.", 1.0)

    def ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        """Its answer, or None when it died or took longer than `timeout` seconds."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:  # never: both are pipes
            return None
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
        except OSError:
            return None
        line = _read_line(stdout, timeout)
        return None if line is None else json.loads(line)


def _read_line(stream: IO[bytes], timeout: float) -> bytes | None:
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        if not selector.select(timeout):
            return None
    # Its answers are written in one piece, so the rest of the line does not keep us waiting.
    line = stream.readline()
    return line if line.endswith(b"\n") else None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue  # what it was never going to read


# -- the process itself


class _Bytes:
    """A vocabulary of the 256 bytes and the special tokens; the other ids exist and match nothing.

    What compiling costs does not depend on the vocabulary, and this one is made in no time.
    """

    bos_token_id = None

    def __init__(self, specials: dict[int, str], vocab_size: int) -> None:
        self.tokens = [b""] * max(vocab_size, 256 + len(specials) + 1)
        free = [i for i in range(len(self.tokens)) if i not in specials]
        self._ids = free[:256]
        for byte, token in enumerate(self._ids):
            self.tokens[token] = bytes([byte])
        for token, text in specials.items():
            self.tokens[token] = text.encode()
        self.eos_token_id = free[256]
        self.tokens[self.eos_token_id] = b"<|end of text|>"
        self.special_token_ids = [*specials, self.eos_token_id]

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self._ids[byte] for byte in data]


def to_grammar(kind: Kind, source: str) -> str:
    """llguidance's own form of a JSON schema, a regex, a JSON list of strings, or a Lark or GBNF
    grammar.

    Raises:
        ValueError: the source is not of its kind.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    if kind == "json":
        return LLMatcher.grammar_from_json_schema(
            source,
            defaults={"whitespace_pattern": _WHITESPACE},
            # "x-guidance": {"lenient": true} in a schema would leave keywords out in silence
            overrides={"lenient": False, "coerce_one_of": False},
        )
    if kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if kind == "choice":
        # One terminal: as alternatives of a rule more than 2 000 would be too many.
        options = json.loads(source)
        return LLMatcher.grammar_from_lark(
            "start: OPTION\nOPTION: " + " | ".join(json.dumps(option) for option in options)
        )
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(source))
    except GbnfToLarkError as error:
        raise ValueError(str(error)) from error


def _answer(tokenizer: Any, kind: Kind, source: str) -> dict[str, Any]:
    from llguidance import LLMatcher, LLParserLimits

    try:
        grammar = to_grammar(kind, source)
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except ValueError as error:
        return {"error": str(error)}
    matcher = LLMatcher(tokenizer, grammar, limits=LLParserLimits(**LIMITS), log_level=0)
    if not matcher.is_error():
        ignored = matcher.get_grammar_warnings()
        if ignored:
            return {"error": ignored[0]}
        _walk(matcher)
    return {"error": matcher.get_error()} if matcher.is_error() else {"grammar": grammar}


def _walk(matcher: Any) -> None:
    """Some steps at random; an error stays in the matcher."""
    draw = random.Random(0)  # noqa: S311  # the same grammar is judged the same way every time
    for _ in range(_STEPS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [i for i in range(mask.bit_length()) if mask >> i & 1] if mask else []
        if matcher.is_stopped() or not allowed:
            return
        matcher.consume_token(draw.choice(allowed))


def _serve() -> None:
    from llguidance import LLTokenizer, TokenizerWrapper

    lines = iter(sys.stdin.readline, "")
    hello = json.loads(next(lines))
    specials = {int(token): text for token, text in hello["specials"].items()}
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(specials, hello["vocab_size"])))
    _say({})
    for line in lines:
        request = json.loads(line)
        # SIGPROF is left to the system, which ends the process even inside llguidance.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = _answer(tokenizer, request["kind"], request["source"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(answer)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Answer until the input ends."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    worker = threading.Thread(target=_serve)
    worker.start()
    worker.join()


def explain(raw: str) -> str:
    """One line of llguidance's error, without its excerpts of the grammar and its backtraces."""
    unknown = re.search(r"Unimplemented keys: \[(.*?)\]", raw)
    if unknown:
        return f"the schema's keywords {unknown[1]} are not supported"
    in_regex = re.search(r"regex parse error:.*?\nerror: ([^\n]+)", raw, re.DOTALL)
    if in_regex:
        return in_regex[1]
    if raw.startswith("panic"):
        return "it is too large"
    text = re.split(r"<non-verbose/>|<backtrace>|\n *\d+ \| ", raw)[0]
    return " ".join(text.split())[:300] or "llguidance gives no reason"


if __name__ == "__main__":
    main()
