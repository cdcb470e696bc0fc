"""Constraints: the mask is exact, the end is found, and no grammar hurts anybody but its sender."""

from __future__ import annotations

import gc
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
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
from gossamer.engine.messages import Constraint, Failed, Request, Sampling
from tests.engine.running import ask, prompts, running, text_of
from tests.tiny import EOS_ID, VOCAB_SIZE, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
#: The model's vocabulary is padded, as many models' are.
PADDED = VOCAB_SIZE + 37
TEXTS = [TOKENIZER.decode([token]) for token in range(VOCAB_SIZE)]


@pytest.fixture(scope="module")
def info() -> Iterator[TokenizerInfo]:
    made = tokenizer_info(TOKENIZER, PADDED)
    yield made
    made.sandbox.close()


def allowed(constraint: Constraint) -> set[int]:
    # what was in the array before must not matter
    mask = np.random.default_rng(0).random(PADDED) < 0.5
    constraint.fill_mask(mask)
    return set(np.flatnonzero(mask).tolist())


def say(constraint: Constraint, text: str) -> bool:
    """Whether every token of `text` is allowed in its turn; stops before the first that is not."""
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        if token not in allowed(constraint):
            return False
        constraint.accept(token)
    return True


def complete(constraint: Constraint) -> bool:
    return EOS_ID in allowed(constraint)


def babble(constraint: Constraint, seed: int, most: int = 600) -> str | None:
    """A random text that the constraint allows, or None when it has no end within `most` tokens."""
    draw = random.Random(seed)  # noqa: S311
    tokens: list[int] = []
    for _ in range(most):
        choices = sorted(allowed(constraint))
        assert choices, "nothing is allowed"
        token = EOS_ID if EOS_ID in choices and draw.random() < 0.3 else draw.choice(choices)
        if token == EOS_ID:
            return str(TOKENIZER.decode(tokens))
        constraint.accept(token)
        tokens.append(token)
        if constraint.is_finished():
            return str(TOKENIZER.decode(tokens))
    return None


# -- the mask


OPTIONS = ("Paris", "Paris is", "the", "them", "sea shells", "☃!", 'a "quote"\n', "\x00\x7f\\")


def test_the_mask_of_a_choice_is_exactly_what_can_still_become_an_option(
    info: TokenizerInfo,
) -> None:
    factory = compile_constraint(info, Choice(OPTIONS))
    bytes_of = [_bytes(token) for token in range(VOCAB_SIZE)]
    wanted = [option.encode() for option in OPTIONS]
    seen = 0
    for option in OPTIONS:
        constraint, said = factory(), b""
        for token in [*TOKENIZER.encode(option, add_special_tokens=False), None]:
            expected = {
                t
                for t, piece in enumerate(bytes_of)
                if piece and any(w.startswith(said + piece) for w in wanted)
            } | ({EOS_ID} if said in wanted else set())
            mask = allowed(constraint)
            if said not in wanted and len({w[len(said)] for w in wanted if w.startswith(said)}) < 2:
                # bytes that must follow are said in the tokenizer's own way only
                assert token in mask <= expected
            else:
                assert mask == expected
                seen += len(expected)
            if token is not None:
                constraint.accept(token)
                said += bytes_of[token]
        assert said == option.encode()
    assert seen > 50


def _bytes(token: int) -> bytes:
    """A byte-level token's bytes; none for special tokens."""
    text = str(TOKENIZER.convert_ids_to_tokens(token))
    return b"" if token < 3 else bytes(_BYTE_OF[character] for character in text)


def _byte_level() -> dict[str, int]:
    """GPT-2's names of the bytes: printable ones stand for themselves, the others follow at 256."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_level()


def test_padding_and_special_tokens_are_never_allowed(info: TokenizerInfo) -> None:
    mask = allowed(compile_constraint(info, Regex("(.|\n)+"))())
    # every token with text of its own (a lone byte of a character may begin one)
    assert {t for t, text in enumerate(TEXTS) if t > 2 and "�" not in text} <= mask
    assert max(mask) < VOCAB_SIZE
    assert not mask & {0, 1, 2}


def test_when_finished_only_the_end_may_follow(info: TokenizerInfo) -> None:
    constraint = compile_constraint(info, Regex("ye(s|p)"))()
    assert say(constraint, "ye")
    assert not constraint.is_finished()
    assert not complete(constraint)
    assert say(constraint, "s")
    assert constraint.is_finished()
    assert allowed(constraint) == {EOS_ID}
    constraint.accept(EOS_ID)
    assert constraint.is_finished()


def test_what_may_end_but_need_not_is_not_finished(info: TokenizerInfo) -> None:
    constraint = compile_constraint(info, Regex("a+"))()
    assert say(constraint, "aaa")
    assert complete(constraint)
    assert not constraint.is_finished()
    constraint.accept(EOS_ID)
    assert constraint.is_finished()


def test_several_tokens_may_end_a_text() -> None:
    made = tokenizer_info(TOKENIZER, PADDED, {0, EOS_ID})
    constraint = compile_constraint(made, Choice(["the"]))()
    assert say(constraint, "the")
    assert allowed(constraint) == {0, EOS_ID}
    made.sandbox.close()


def test_every_choice_of_a_request_has_its_own_state(info: TokenizerInfo) -> None:
    factory = compile_constraint(info, Regex("[0-9]{4}"))
    first, second = factory(), factory()
    assert say(first, "1234")
    assert first.is_finished()
    assert not second.is_finished()
    assert say(second, "98")
    assert not say(second, "x")
    assert say(factory(), "5555")


# -- the texts


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/id"}]},
    },
    "required": ["name", "age", "next"],
    "additionalProperties": False,
    "$defs": {"id": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{2}$"}},
}


def _obeys(value: Any) -> bool:
    return (
        set(value) - {"tags"} == {"name", "age", "next"}
        and len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and (value["next"] is None or bool(re.fullmatch("[A-Z]{2}[0-9]{2}", value["next"])))
        and all(tag in ("a", "b") for tag in value.get("tags", []))
        and len(value.get("tags", [])) <= 3
    )


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_schema_allows_obeys_it(info: TokenizerInfo, seed: int) -> None:
    text = babble(compile_constraint(info, Json(SCHEMA))(), seed)
    assert text is not None
    assert _obeys(json.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "x", "age": 151, "next": null}',
        '{"name": "x", "age": 1.5, "next": null}',
        '{"name": "123456789", "age": 1, "next": null}',
        '{"name": "x", "age": 1}',
        '{"name": "x", "age": 1, "next": "AB1"}',
        '{"name": "x", "age": 1, "next": null, "more": 1}',
        "[]",
    ],
)
def test_what_breaks_a_schema_is_masked(info: TokenizerInfo, text: str) -> None:
    constraint = compile_constraint(info, Json(SCHEMA))()
    assert not (say(constraint, text) and complete(constraint))


def test_what_keeps_a_schema_is_not_masked(info: TokenizerInfo) -> None:
    pretty = json.dumps({"name": "Ann", "age": 150, "tags": ["a"], "next": "AB12"}, indent=2)
    for text in (pretty, '{"name":"é\\n","age":0,"next":null}'):
        constraint = compile_constraint(info, Json(SCHEMA))()
        assert say(constraint, text)
        assert constraint.is_finished()


def test_no_schema_means_any_object(info: TokenizerInfo) -> None:
    factory = compile_constraint(info, Json())
    assert say(factory(), '{"a": [1, {"b": null}], "c": "é\\n"}')
    assert not say(factory(), "[")


def test_white_space_in_json_comes_to_an_end(info: TokenizerInfo) -> None:
    factory = compile_constraint(info, Json())
    assert say(factory(), '{\n    "a": 1\n}')
    assert not say(factory(), "{" + " " * 100)
    assert not say(factory(), "{\n\n\n")


@pytest.mark.parametrize(
    "text",
    [
        'start: "SELECT " NAME ("," NAME)*\nNAME: /[a-z]+/',
        'root ::= "SELECT " name ("," name)*\nname ::= [a-z]+',
    ],
    ids=["lark", "gbnf"],
)
def test_grammars_of_both_syntaxes(info: TokenizerInfo, text: str) -> None:
    constraint = compile_constraint(info, Grammar(text))()
    assert say(constraint, "SELECT a,bc")
    assert complete(constraint)
    assert not say(constraint, ",,")


def test_a_grammar_may_name_special_tokens(info: TokenizerInfo) -> None:
    factory = compile_constraint(info, Grammar('start: "a" <|im_start|> "b"'))
    constraint = factory()
    assert say(constraint, "a")
    assert allowed(constraint) == {TOKENIZER.convert_tokens_to_ids("<|im_start|>")}


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


PRIMES = (9973, 9967)
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


AMBIGUOUS = Grammar("start: s\ns: /[a-z]/ | s s | s s s")


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
    assert time.thread_time() - started < 1.0


def test_a_token_that_was_not_allowed_shows_at_the_next_mask(info: TokenizerInfo) -> None:
    constraint = compile_constraint(info, Regex("[0-9]+"))()
    constraint.accept(TOKENIZER.encode("x", add_special_tokens=False)[0])
    assert not constraint.is_finished()
    with pytest.raises(InvalidRequest):
        allowed(constraint)


# -- in the engine, and around it


def test_rows_of_a_batch_follow_their_own_grammars() -> None:
    made = tokenizer_info(TOKENIZER, VOCAB_SIZE)
    specs: Sequence[Spec | None] = [
        Json(SCHEMA),
        Choice(["sea shells", "the"]),
        None,
        Regex("[0-9]{3}-[a-f]{2}"),
        AMBIGUOUS,
    ]
    sampling = Sampling(max_tokens=200, temperature=1.0, seed=5)
    requests = [
        Request(
            str(i),
            prompt,
            sampling=sampling,
            constraint=None if spec is None else compile_constraint(made, spec),
        )
        for i, (prompt, spec) in enumerate(
            zip(prompts((9, 5, 12, 7, 8), VOCAB_SIZE), specs, strict=True)
        )
    ]
    with running(tiny_model("llama")) as engine:
        answers = ask(engine, *requests)
        (alone,) = ask(engine, requests[2])
    assert _obeys(json.loads(text_of(answers[0])))
    assert text_of(answers[1]) in ("sea shells", "the")
    assert text_of(answers[2]) == text_of(alone) != ""
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", text_of(answers[3]))
    failed = answers[4][-1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, InvalidRequest)
    made.sandbox.close()


def test_llguidance_is_not_needed_to_import_the_engine() -> None:
    code = """
import sys
import gossamer.engine.client, gossamer.engine.grammar
assert "llguidance" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_process_goes_with_its_owner() -> None:
    made = tokenizer_info(TOKENIZER, VOCAB_SIZE)
    compile_constraint(made, Regex("a"))
    child = made.sandbox._child
    assert child is not None
    process = child._process
    assert process.poll() is None
    del made, child
    gc.collect()
    assert process.poll() is not None
