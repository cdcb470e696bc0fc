"""Constraints that nobody can follow, or that cost too much: they hurt their sender only."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from typing import Any

import pytest

from gossamer.engine.errors import InvalidRequest
from gossamer.engine.grammar import (
    MAX_SOURCE_BYTES,
    Choice,
    Grammar,
    Json,
    Regex,
    Spec,
    TokenizerInfo,
    compile_constraint,
    tokenizer_info,
)
from gossamer.engine.grammar_sandbox import Refused, Sandbox, explain
from tests.engine.constraining import AMBIGUOUS, PADDED, TEXTS, TOKENIZER, allowed, say

# -- refusals


@pytest.mark.parametrize(
    ("spec", "field", "message"),
    [
        (Regex("("), "regex", "unclosed group"),
        (Regex("(?=a)b"), "regex", "look-around"),
        (Regex(r"(a)\1"), "regex", "backreferences"),
        (Regex(""), "regex", "empty"),
        (Regex("a\ud800"), "regex", "Unicode"),
        (Regex("a" * (MAX_SOURCE_BYTES + 1)), "regex", "bytes"),
        (Choice([]), "choice", "at least one"),
        (Choice(["a", ""]), "choice", "none of them empty"),
        (Choice(["\ud800"]), "choice", "cannot be used"),
        (Json({"type": "nonsense"}), "json", "nonsense"),
        (Json({"not": {}, "if": {}}), "json", '"if", "not"'),
        (Json({"type": "array", "uniqueItems": True}), "json", '"uniqueItems"'),
        (Json({"type": "string", "format": "zip code"}), "json", "zip code"),
        (Json({"x-guidance": {"lenient": True}, "not": {}}), "json", '"not"'),
        (Json({"$ref": "https://example.com/s.json"}), "json", "example.com"),
        (Json({"$ref": "#"}), "json", "Nothing satisfies"),
        (Json({"oneOf": [{"type": "string"}, {"maxLength": 3}]}), "json", "oneOf"),
        (Json({"a": {1, 2}}), "json", "not JSON"),
        (Grammar("start: foo"), "grammar", "unknown name"),
        (Grammar("start: ("), "grammar", "Expected"),
        (Grammar("root ::= ("), "grammar", "Expected"),
        (Grammar(" \n"), "grammar", "empty"),
        (Grammar("start: <|no_such_token|>"), "grammar", "special token"),
        (Grammar("start: @other"), "grammar", "unknown grammar"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_named(
    info: TokenizerInfo, spec: Spec, field: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)) as refused:
        compile_constraint(info, spec)
    assert refused.value.field == f"structured_outputs.{field}"
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_the_field_of_an_error_is_the_callers(info: TokenizerInfo) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compile_constraint(info, Json({"not": {}}), field="response_format")
    assert refused.value.field == "response_format"


def test_a_tokenizer_without_an_end_has_no_structured_output() -> None:
    made = tokenizer_info(TOKENIZER, PADDED, eos=())
    with pytest.raises(InvalidRequest, match="no end-of-text token"):
        compile_constraint(made, Regex("a"))


def test_explanations_leave_out_backtraces() -> None:
    assert explain("panic: assertion failed: x\n<backtrace>\n 0: y") == "it is too large"
    assert explain("at 2(4): unknown name\n   1 | start: a\n") == "at 2(4): unknown name"


def test_a_token_that_was_not_allowed_shows_at_the_next_mask(info: TokenizerInfo) -> None:
    constraint = compile_constraint(info, Regex("[0-9]+"))()
    constraint.accept(TOKENIZER.encode("x", add_special_tokens=False)[0])
    assert not constraint.is_finished()
    with pytest.raises(InvalidRequest):
        allowed(constraint)


# -- bombs


def _chain(length: int) -> dict[str, Any]:
    """References in a chain: llguidance's stack overflows at about a thousand."""
    defs: dict[str, Any] = {
        f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)
    }
    return {"$defs": defs | {f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS: dict[str, Spec] = {
    "stars": Regex("a*" * 32_000),
    "some stars": Regex("(a|b)*" * 10_000),
    "repetitions": Regex("(a{1000}){1000}"),
    "deep repetitions": Regex("((((a{100}){100}){100}){100}){100}"),
    "count": Regex("a{4294967295}"),
    "brackets": Regex("(" * 30_000 + "a" + ")" * 30_000),
    "references": Json(_chain(1000)),
    "depth": Json(_nested(900)),
    "patterns": Json({"patternProperties": {f"^{i}a.*$": {} for i in range(1800)}}),
    "enumeration": Json({"enum": list(range(9000))}),
    "product": Json(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(6)]}
                for i in range(12)
            ]
        }
    ),
    "common multiple": Json(
        {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967)]}
    ),
    "doubling rules": Grammar(
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"'
    ),
    "doubling terminals": Grammar(
        "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(60)) + '\nR60: "a"'
    ),
    "optional": Grammar("start: " + '"a"? ' * 9000),
    "intersection": Grammar("start: A\nA: " + " & ".join(f"/.*{i}.*/" for i in range(5000))),
    "nothing": Grammar("start: start"),
    "parentheses": Grammar("start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "gbnf parentheses": Grammar("root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_within_its_limits(info: TokenizerInfo, name: str) -> None:
    compile_constraint(info, Regex("warm"))  # the process is there
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.monotonic()
    with pytest.raises(InvalidRequest):
        compile_constraint(info, BOMBS[name])
    assert time.monotonic() - started < 5
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 1.0  # of this process; the other one is counted apart
    assert after.ru_maxrss - before.ru_maxrss < 100 << 10
    assert say(compile_constraint(info, Choice(["the", "sea"]))(), "the")


def test_the_sandbox_is_what_dies() -> None:
    """The bombs are real: without limits the worst of them ends the process that compiles it."""
    sandbox = Sandbox({}, 300)
    source = json.dumps(_chain(20_000))
    assert isinstance(sandbox.compile("json", source), Refused)
    assert isinstance(sandbox.compile("regex", "a+"), str)
    # the same, in a process without limits of its own
    code = """
import sys
from llguidance import LLMatcher
LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(sys.stdin.read()))
"""
    alone = subprocess.run([sys.executable, "-c", code], input=source.encode())
    assert alone.returncode < 0
    sandbox.close()


def test_an_ambiguous_grammar_fails_at_a_mask_before_it_costs_a_second(info: TokenizerInfo) -> None:
    constraint = compile_constraint(info, AMBIGUOUS)()
    letters = [token for token, text in enumerate(TEXTS) if text in set("abcdefgh")]
    started, steps = time.thread_time(), 0
    refused: InvalidRequest | None = None
    while refused is None and steps < 2000:
        try:
            assert set(letters) <= allowed(constraint)
        except InvalidRequest as error:
            refused = error
        constraint.accept(letters[steps % len(letters)])
        assert not constraint.is_finished()
        steps += 1
    assert refused is not None
    assert steps > 5
    assert time.thread_time() - started < 2.0  # 1.0 on a busy AMD EPYC
