"""Text as it becomes certain: whole characters, stop strings across token borders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.engine.text import TextStream


class Bytes:
    """A decoder whose tokens are bytes: every multi-byte character crosses token borders."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        del skip_special_tokens
        return bytes(token_ids).decode("utf-8", errors="replace")


def run(text: str, **rules: object) -> tuple[list[str], str | None]:
    stream = TextStream(Bytes(), (), True, **rules)  # type: ignore[arg-type]
    parts: list[str] = []
    for byte in text.encode():
        part, stop = stream.push(byte)
        parts.append(part)
        if stop is not None:
            return parts, stop
    rest, stop = stream.finish()
    return [*parts, rest], stop


@given(st.text(max_size=40))
def test_the_parts_together_are_the_text(text: str) -> None:
    parts, stop = run(text)
    assert "".join(parts) == text
    assert stop is None
    assert not any("\ufffd" in part for part in parts[:-1]) or "\ufffd" in text


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    parts, stop = run(text, stop=tuple(stops))
    got = "".join(parts)
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if not ends:
        assert (got, stop) == (text, None)
        return
    # The stop that is complete first wins; nothing of it was given out.
    assert stop in stops
    assert stop is not None
    assert text.startswith(got + stop)
    assert len(got + stop) == min(ends)


def test_a_stop_string_is_kept_on_request() -> None:
    parts, stop = run("hello END more", stop=("END",), include_stop=True)
    assert ("".join(parts), stop) == ("hello END", "END")


def test_nothing_that_might_become_a_stop_string_is_given_out() -> None:
    parts, _ = run("xxEN!", stop=("END",))
    assert parts[:4] == ["x", "x", "", ""]
    assert parts[4] == "EN!"


def test_before_min_tokens_a_stop_string_is_text() -> None:
    stream = TextStream(Bytes(), (), True, ("ab",))
    assert stream.push(ord("a"), may_stop=False) == ("a", None)
    assert stream.push(ord("b"), may_stop=False) == ("b", None)
    assert stream.push(ord("a")) == ("", None)
    assert stream.push(ord("b")) == ("", "ab")


@pytest.mark.parametrize("prompt", ["", "é", "abcdefgh"])
def test_the_prompt_is_context_and_not_output(prompt: str) -> None:
    stream = TextStream(Bytes(), tuple(prompt.encode()), True)
    assert "".join(stream.push(b)[0] for b in b"out") + stream.finish()[0] == "out"


def test_a_stop_string_in_what_was_held_back_is_found_at_the_end() -> None:
    stream = TextStream(Bytes(), (), True, ("END\ufffd",))
    for byte in b"abEND":
        stream.push(byte)
    assert stream.push(0xE2) == ("", None)
    assert stream.finish() == ("", "END\ufffd")


def test_bytes_that_never_become_a_character_are_given_out() -> None:
    stream = TextStream(Bytes(), (), True)
    texts = [stream.push(0xFF)[0] for _ in range(40)]
    assert "".join(texts).count("\ufffd") >= 32
    assert max(map(len, texts)) <= 8
