"""Text to tokens and back, from an artifact's tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from pathlib import Path

import tokenizers

from llmc.errors import ArtifactError, RequestError
from llmc.runtime.detokenizer import ByteDetokenizer, Detokenizer, TokenBytes, WindowDetokenizer
from llmc.runtime.step import Int32

_CONTEXT_TOKENS = 4  # of the prompt, for the detokenizer: a character has at most four bytes


class Tokenizer:
    """Wraps `tokenizers.Tokenizer`; knows each token's bytes and which tokens are special."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # A file may carry training's truncation and padding: neither may touch a prompt.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special = frozenset(
            i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        decoder = tokenizer.decoder  # its state is its part of tokenizer.json
        self._token_bytes = TokenBytes.from_decoder(
            None if decoder is None else json.loads(decoder.__getstate__())
        )
        self._bytes: dict[int, bytes] = {}
        self._longest: int | None = None

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Reads tokenizer.json; ArtifactError where it is not one."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as exc:  # the library raises plain Exception
            raise ArtifactError(
                f"{path}: not a tokenizer: {exc}", hint="compile the model again"
            ) from exc

    @property
    def vocab_size(self) -> int:
        """Tokens, the added ones included."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def max_token_chars(self) -> int:
        """Characters of the longest token as the vocabulary spells it."""
        if self._longest is None:
            self._longest = max(map(len, self._tokenizer.get_vocab()), default=1)
        return self._longest

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; RequestError where it is not valid Unicode.

        `add_special_tokens` adds what the model expects around a text, such as its first token. A
        rendered chat template has them already.
        """
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise RequestError(
                f"the text is not valid Unicode: lone surrogate at {exc.start}", param="prompt"
            ) from exc
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, token_ids: Seq[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`."""
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return str(text)

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for an id without a token."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, special tokens' spelling included."""
        value = self._bytes.get(token_id)
        if value is None:
            if self._token_bytes is None or token_id in self._special:
                value = self.decode([token_id], skip_special_tokens=False).encode()
            else:
                value = self._token_bytes.of(self.token_text(token_id))
            self._bytes[token_id] = value
        return value

    def is_special(self, token_id: int) -> bool:
        """Whether a token steers the model and is no text."""
        return token_id in self._special

    def detokenizer(self, prompt: Seq[int] | Int32) -> Detokenizer:
        """A detokenizer for what follows `prompt` (its token ids).

        After a special token, or nothing, a text begins; after any other token it goes on, and a
        leading space is kept.
        """
        context = [int(i) for i in prompt[-_CONTEXT_TOKENS:]]
        begins = not context or context[-1] in self._special
        if begins:
            context = []
        if self._token_bytes is None:
            return WindowDetokenizer(self.decode, context=context, skipped=self._special)
        stripped = self._token_bytes.num_stripped_spaces if begins else 0
        return ByteDetokenizer(self._text_bytes, context=context, num_stripped_spaces=stripped)

    def _text_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special else self.token_bytes(token_id)
