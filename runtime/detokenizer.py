"""Text from tokens that arrive one by one: never half a character, linear in their number.

The pieces of a text, joined, equal the tokenizer's own decoding of all tokens at once. The one
exception is bytes that are no UTF-8 at all: the number of replacement characters may differ.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LONGEST_CHARACTER = 4  # bytes of UTF-8, so also tokens


class Detokenizer(Protocol):
    """Turns one sequence's generated tokens into text."""

    def feed(self, token_id: int) -> str:
        """The text that the next token completes; empty while a character is incomplete."""

    def flush(self) -> str:
        """What remains after the last token: a replacement character for half a character."""


class TokenBytes:
    """The bytes each token stands for, for tokenizers whose tokens have bytes of their own.

    Two families do, and nearly every language model is in one of them: byte-level BPE, where each
    character of a token is a byte in disguise (Radford et al. 2019), and SentencePiece, where `▁`
    is a space, `<0xAB>` a byte and one leading space of a text is not written.
    """

    def __init__(self, to_bytes: Callable[[str], bytes], *, num_stripped_spaces: int) -> None:
        self.of = to_bytes
        self.num_stripped_spaces = num_stripped_spaces  # at the beginning of a text

    @classmethod
    def from_decoder(cls, decoder: dict[str, Any] | None) -> TokenBytes | None:
        """Reads the `decoder` entry of tokenizer.json; None if tokens have no own bytes."""
        if decoder is None:
            return None
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [step["type"] for step in steps if step["type"] != "Fuse"]
        if kinds == ["ByteLevel"]:
            return cls(_byte_level_bytes, num_stripped_spaces=0)
        if kinds and kinds[-1] == "Strip":
            strip = steps[-1]
            if strip["content"] != " " or strip["stop"] or {"type": "Fuse"} not in steps:
                return None
            num_stripped = int(strip["start"])
            kinds.pop()
        else:
            num_stripped = 0
        if "ByteFallback" not in kinds or not set(kinds) <= {"Replace", "ByteFallback"}:
            return None
        replaced: list[tuple[str, str]] = []
        for step in steps:
            if step["type"] == "Replace":
                pattern = step["pattern"].get("String")
                if pattern is None:  # a regular expression, in another dialect than Python's
                    return None
                replaced.append((pattern, step["content"]))
        return cls(_sentencepiece_bytes(replaced), num_stripped_spaces=num_stripped)


class ByteDetokenizer:
    """For tokens that have bytes of their own."""

    def __init__(
        self,
        bytes_of: Callable[[int], bytes],
        *,
        context: Iterable[int],
        num_stripped_spaces: int,
    ) -> None:
        """`context`: the tokens before, whose last character may be incomplete; not written.

        `num_stripped_spaces` is what a beginning loses: 0 where the text goes on after a prompt.
        """
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_stripped_spaces = num_stripped_spaces
        for token_id in context:
            self._decoder.decode(bytes_of(token_id))

    def feed(self, token_id: int) -> str:
        """The text that the next token completes."""
        return self._stripped(self._decoder.decode(self._bytes_of(token_id)))

    def flush(self) -> str:
        """A replacement character where half a character remains."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._num_stripped_spaces and text:
            spaces = len(text) - len(text.lstrip(" "))
            text = text[min(spaces, self._num_stripped_spaces) :]
            self._num_stripped_spaces = 0
        return text


class WindowDetokenizer:
    """For all other tokenizers: decodes the last few tokens with and without the newest."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        context: Iterable[int],
        skipped: frozenset[int],
    ) -> None:
        """`context`: the tokens before, not written; `skipped`: tokens that have no text."""
        self._decode = decode
        self._skipped = skipped
        self._ids = [i for i in context if i not in skipped]
        self._num_written = len(self._ids)
        self._written = decode(self._ids) if self._ids else ""

    def feed(self, token_id: int) -> str:
        """The text that the next token completes."""
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        # A replacement character is an incomplete one, unless enough tokens came to complete it.
        num_pending = len(self._ids) - self._num_written
        if text.endswith("�") and num_pending < _LONGEST_CHARACTER:
            return ""
        return self._write(text)

    def flush(self) -> str:
        """What the last tokens gave, complete or not."""
        if len(self._ids) == self._num_written:
            return ""
        return self._write(self._decode(self._ids))

    def _write(self, text: str) -> str:
        new = text[len(self._written) :]
        # The tokens just written stay as context: what follows may be spelt by what precedes.
        self._ids = self._ids[self._num_written :]
        self._num_written = len(self._ids)
        self._written = self._decode(self._ids)
        return new


def _disguised_bytes() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for U+0100 and on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    table.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = _disguised_bytes()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:  # an added token that was never disguised
        return token.encode()


def _sentencepiece_bytes(replaced: list[tuple[str, str]]) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        match = _BYTE_TOKEN.fullmatch(token)
        if match:
            return bytes([int(match[1], 16)])
        for pattern, content in replaced:
            token = token.replace(pattern, content)
        return token.encode()

    return to_bytes
