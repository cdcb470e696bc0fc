"""Constraints: the mask is exact, the end is found, and what comes out obeys."""

from __future__ import annotations

import json

import pytest

from gossamer.engine.grammar import (
    Choice,
    Grammar,
    Json,
    Regex,
    TokenizerInfo,
    compile_constraint,
    tokenizer_info,
)
from tests.engine.constraining import (
    PADDED,
    SCHEMA,
    TEXTS,
    TOKENIZER,
    allowed,
    babble,
    may_end,
    obeys_schema,
    say,
)
from tests.tiny import EOS_ID, VOCAB_SIZE

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
    assert not may_end(constraint)
    assert say(constraint, "s")
    assert constraint.is_finished()
    assert allowed(constraint) == {EOS_ID}
    constraint.accept(EOS_ID)
    assert constraint.is_finished()


def test_what_may_end_but_need_not_is_not_finished(info: TokenizerInfo) -> None:
    constraint = compile_constraint(info, Regex("a+"))()
    assert say(constraint, "aaa")
    assert may_end(constraint)
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


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_schema_allows_obeys_it(info: TokenizerInfo, seed: int) -> None:
    text = babble(compile_constraint(info, Json(SCHEMA))(), seed)
    assert text is not None
    assert obeys_schema(json.loads(text))


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
    assert not (say(constraint, text) and may_end(constraint))


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
    assert may_end(constraint)
    assert not say(constraint, ",,")


def test_a_grammar_may_name_special_tokens(info: TokenizerInfo) -> None:
    factory = compile_constraint(info, Grammar('start: "a" <|im_start|> "b"'))
    constraint = factory()
    assert say(constraint, "a")
    assert allowed(constraint) == {TOKENIZER.convert_tokens_to_ids("<|im_start|>")}
