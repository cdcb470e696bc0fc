"""What a single token says, for log-probabilities: its text, and the bytes it stands for."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEX = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """Token id → bytes and text. Answers are kept: the same alternatives occur again and again.

    A token of a byte-level or byte-fallback vocabulary may be a part of a character; its bytes are
    read off the vocabulary, because decoding it alone would give U+FFFD.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {
            token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()
        }
        decoders = _decoders(tokenizer)
        self._byte_level = _byte_alphabet() if "ByteLevel" in decoders else None
        self._byte_fallback = "ByteFallback" in decoders
        self.bytes = lru_cache(maxsize=1 << 16)(self._bytes)
        self.text = lru_cache(maxsize=1 << 16)(self._text)
        self.label = lru_cache(maxsize=1 << 16)(self._label)

    def is_special(self, token: int) -> bool:
        """Whether the token is one of those that a text leaves out."""
        return token in self._special

    def _bytes(self, token: int) -> bytes:
        """The bytes that the token adds to a text (UTF-8)."""
        if token in self._special:
            return self._special[token].encode()
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if self._byte_level is not None and all(char in self._byte_level for char in piece):
            return bytes(self._byte_level[char] for char in piece)
        if self._byte_fallback:
            if match := _HEX.fullmatch(piece):
                return bytes([int(match[1], 16)])
            return piece.replace("\u2581", " ").encode()
        return str(self._tokenizer.decode([token])).encode()

    def _text(self, token: int) -> str:
        """The token as text; what is not a whole character becomes U+FFFD."""
        return self.bytes(token).decode(errors="replace")

    def _label(self, token: int) -> str:
        r"""The token as the completions route names it: its text, or `bytes:\xe2\x98`."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The types of the tokenizer's decoding steps, as the tokenizers library names them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    decoder: dict[str, Any] = json.loads(backend.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    return {step["type"] for step in steps if "type" in step}


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of a byte-level vocabulary (GPT-2's `bytes_to_unicode`, the other way)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }
