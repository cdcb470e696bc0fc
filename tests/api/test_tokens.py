"""The bytes of single tokens, for each family of tokenizers."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gossamer.api.tokens import TokenText
from tests.tiny import BOS_ID, SPECIAL_TOKENS, tiny_tokenizer

TEXT = "naïve ☃ 🦋\ttab\n  two"


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with U+2581 for a space, and single bytes for what is not in the vocabulary."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "w", "o", "a", "b"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece_like])
def test_the_bytes_of_the_tokens_of_a_text_are_the_text(
    make: type[PreTrainedTokenizerFast],
) -> None:
    tokenizer = make()
    tokens = TokenText(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(tokens.bytes(token) for token in ids).decode() == TEXT
    assert any(tokens.label(token).startswith("bytes:") for token in ids)
    assert b"".join(tokens.bytes(token) for token in ids[:-1]).decode() != TEXT


def test_special_tokens_are_named_and_known() -> None:
    tokens = TokenText(tiny_tokenizer())
    assert tokens.text(BOS_ID) == SPECIAL_TOKENS[BOS_ID]
    assert tokens.is_special(BOS_ID)
    assert not tokens.is_special(100)
