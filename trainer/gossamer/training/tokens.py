"""Text as tokens that know where in it they lie, and what a model would write behind a prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text.

    Attributes:
        ids: their numbers.
        spans: first character of each and the one after its last, in that text. A tokenizer may
            leave white space out of them. None at all where it cannot say (`is_fast`).
    """

    ids: list[int]
    spans: Sequence[tuple[int, int]]

    def begins_with(self, other: Tokens) -> bool:
        """Whether the first of these are the other's."""
        return self.ids[: len(other.ids)] == other.ids

    def after(self, count: int, moved: int = 0) -> Tokens:
        """All but the first so many, for a text that begins `moved` characters earlier."""
        spans = [(begin + moved, end + moved) for begin, end in self.spans[count:]]
        return Tokens(self.ids[count:], spans)


def tokens_of(tokenizer: Tokenizer, text: str, *, special: bool = False) -> Tokens:
    """A text in tokens; `special` lets the tokenizer add what it begins texts with."""
    if not tokenizer.is_fast:
        return Tokens(tokenizer(text, add_special_tokens=special)["input_ids"], ())
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return Tokens(found["input_ids"], found["offset_mapping"])


def continuation(
    tokenizer: Tokenizer, prompt: str, served: Tokens, answer: str, *, special: bool = False
) -> Tokens:
    """What a model has to write behind a served prompt to say an answer.

    The server tokenises the prompt by itself, so its tokens stand. Where those of the whole text
    begin with them, the rest is the answer. Otherwise a token of the whole text runs over the
    border, and the answer is tokenised apart. A tokenizer may take that for the beginning of a text
    or of a word, and put a space before it that nobody has written (`▁` of SentencePiece, the
    missing `##` of WordPiece); so it is tokenised behind one thing and another, the first that
    decodes to what was meant is taken, and the answer by itself if none does.

    Args:
        served: the prompt's tokens.
        special: as `served` was made.

    Returns:
        Tokens of the answer; their spans are in prompt + answer.
    """
    whole = tokens_of(tokenizer, prompt + answer, special=special)
    if whole.begins_with(served) and len(whole.ids) > len(served.ids):
        return whole.after(len(served.ids))
    meant = (tokenizer.decode(whole.ids), f"{tokenizer.decode(served.ids)}{answer}")
    candidates = list(_apart(tokenizer, prompt, answer))
    for found in candidates:
        if tokenizer.decode([*served.ids, *found.ids]) in meant:
            return found
    return candidates[0]


def _apart(tokenizer: Tokenizer, prompt: str, answer: str) -> Iterator[Tokens]:
    """The answer's tokens by itself, and behind several texts where none runs over the border."""
    anchors = (tokenizer.eos_token or "", "\n", prompt[-1:]) if tokenizer.is_fast else ()
    for anchor in dict.fromkeys(("", *anchors)):
        found = tokens_of(tokenizer, anchor + answer)
        count = sum(end <= len(anchor) for _, end in found.spans) if anchor else 0
        if all(begin >= len(anchor) for begin, _ in found.spans[count:]):
            yield found.after(count, len(prompt) - len(anchor))


def answer_tokens(
    tokens: Tokens, text: str, first: int, content_end: int, ends: Collection[int]
) -> tuple[range, bool]:
    """Which tokens an answer is made of, and whether the last of them ends it.

    Up to the first token that the server stops at, if nothing but white space lies between the
    answer's text and that token. Otherwise up to the end of the answer's text: what a template
    writes behind that is not the model's to write, for the server would show it to the client.

    Args:
        first: the answer's first token.
        content_end: the character of the text where what was said ends.
        ends: tokens that the server stops at.
    """
    for index in range(first, len(tokens.ids)):
        begin, _ = tokens.spans[index]
        if tokens.ids[index] in ends and not text[content_end:begin].strip():
            return range(first, index + 1), True
    inside = [i for i in range(first, len(tokens.ids)) if tokens.spans[i][1] <= content_end]
    return range(first, inside[-1] + 1 if inside else first), False


def first_token(tokens: Tokens, character: int) -> int:
    """The first token that holds nothing before that character.

    What tokenizers leave out of their spans, white space, is taken to belong to the token after.
    """
    covered = 0
    for index, (_, end) in enumerate(tokens.spans):
        if covered >= character:
            return index
        covered = max(covered, end)
    return len(tokens.ids)
