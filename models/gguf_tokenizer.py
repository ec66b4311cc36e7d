"""A `tokenizers` JSON from the vocabulary in a GGUF file's metadata.

GGUF names the kind of tokenizer and, for byte-level ones, how text is split before merging;
`names.json` says what the names mean. The result gives the ids that GGUF's own runtime gives.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as token_models
from tokenizers.processors import TemplateProcessing

from llmc.errors import ImportModelError, UnsupportedError
from llmc.models.gguf_file import GgufFile
from llmc.models.names import SplitScheme, gguf_split_schemes, gguf_tokenizer_kinds

_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type
_SPACE = "\u2581"  # what SentencePiece writes for a space
_DAMAGED = "convert the model to GGUF with a recent converter"


def build_tokenizer(file: GgufFile) -> bytes | None:
    """The tokenizer as JSON; None where the file has no vocabulary.

    Raises UnsupportedError naming a kind of tokenizer or a way of splitting that is not known,
    ImportModelError where the vocabulary is inconsistent.
    """
    kind_name = file.optional_string(_KEY + "model")
    tokens = file.strings(_KEY + "tokens")
    if kind_name is None or not tokens:
        return None
    kind = gguf_tokenizer_kinds().get(kind_name)
    if kind is None:
        raise UnsupportedError(
            f"{file.path}: unknown kind of tokenizer {kind_name!r}",
            hint="use the model's Hugging Face folder, which carries its tokenizer.json",
        )
    types = _types(file, tokens)
    try:
        if kind == "byte_level":
            scheme = _split_scheme(file)
            tokenizer, add_bos = _byte_level(file, tokens, scheme), scheme.add_bos
        elif kind == "sentencepiece":
            tokenizer, add_bos = _sentencepiece(file, tokens, types), True
        else:
            tokenizer, add_bos = _unigram(file, tokens, types), False
        _add_special_tokens(tokenizer, tokens, types)
        _add_template(file, tokenizer, tokens, add_bos=add_bos)
        return tokenizer.to_str().encode()
    except (ImportModelError, UnsupportedError):
        raise
    except Exception as exc:  # the library raises plain Exceptions
        raise ImportModelError(
            f"{file.path}: the vocabulary makes no tokenizer: {str(exc)[:200]}", hint=_DAMAGED
        ) from exc


def _types(file: GgufFile, tokens: list[str]) -> list[int]:
    types = [int(value) for value in file.numbers(_KEY + "token_type")] or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ImportModelError(
            f"{file.path}: {len(types)} token types for {len(tokens)} tokens", hint=_DAMAGED
        )
    return types


def _scores(file: GgufFile, tokens: list[str]) -> list[float]:
    scores = file.numbers(_KEY + "scores")
    if len(scores) != len(tokens):
        raise ImportModelError(
            f"{file.path}: {len(scores)} token scores for {len(tokens)} tokens", hint=_DAMAGED
        )
    return scores


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    vocabulary: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        vocabulary.setdefault(token, token_id)
    return vocabulary


def _split_scheme(file: GgufFile) -> SplitScheme:
    name = file.optional_string(_KEY + "pre") or "default"
    scheme = gguf_split_schemes().get(name)
    if scheme is None:
        raise UnsupportedError(
            f"{file.path}: unknown pre-tokenizer {name!r}",
            hint="use the model's Hugging Face folder, which carries its tokenizer.json",
        )
    return scheme


def _byte_level(file: GgufFile, tokens: list[str], scheme: SplitScheme) -> Tokenizer:
    """Byte-pair encoding over bytes written as printable characters."""
    merges: list[tuple[str, str]] = []
    for merge in file.strings(_KEY + "merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise ImportModelError(
                f"{file.path}: merge {merge[:60]!r}, expected two tokens", hint=_DAMAGED
            )
        merges.append((left, right))
    tokenizer = Tokenizer(
        token_models.BPE(
            vocab=_vocabulary(tokens), merges=merges, ignore_merges=scheme.ignore_merges
        )
    )
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in scheme.splits]
    bytes_as_text = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_as_text])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """Byte-pair encoding over characters: the pair that makes the best-scored token merges first.

    `tokenizers` merges by rank, so every way to make a token of two others is listed, best first.
    """
    vocabulary = _vocabulary(tokens)
    scores = _scores(file, tokens)
    ranked: list[tuple[float, int, int, str, str]] = []
    for token_id, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[token_id], left, right, token[:cut], token[cut:]))
    ranked.sort()
    tokenizer = Tokenizer(
        token_models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in ranked],
            unk_token=_unknown_token(file, tokens, types),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.optional_bool(_KEY + "add_space_prefix") is not False
    spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), *spaces] if prefix else spaces
    )
    tokenizer.decoder = _space_decoder(strip=prefix)
    return tokenizer


def _unigram(file: GgufFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """The likeliest way to cut the text into tokens, by their scores."""
    unknown = _unknown_token(file, tokens, types)
    tokenizer = Tokenizer(
        token_models.Unigram(
            vocab=list(zip(tokens, _scores(file, tokens), strict=True)),
            unk_id=None if unknown is None else tokens.index(unknown),
        )
    )
    charsmap = file.numbers(_KEY + "precompiled_charsmap")
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(
            bytes(int(value) & 255 for value in charsmap)
        )
    prefix = file.optional_bool(_KEY + "add_space_prefix") is not False
    scheme = "always" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
    return tokenizer


def _space_decoder(*, strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def _unknown_token(file: GgufFile, tokens: list[str], types: list[int]) -> str | None:
    token_id = file.optional_int(_KEY + "unknown_token_id")
    if token_id is None:
        return tokens[types.index(_UNKNOWN)] if _UNKNOWN in types else None
    return _token(file, tokens, token_id, "unknown_token_id")


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control tokens are special; user-defined ones too are found in text before anything else."""
    added = [
        AddedToken(token, normalized=False, special=type_ == _CONTROL)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (_CONTROL, _USER_DEFINED) and token
    ]
    # One list keeps the ids: each is in the vocabulary already.
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


def _add_template(
    file: GgufFile, tokenizer: Tokenizer, tokens: list[str], *, add_bos: bool
) -> None:
    """Puts the beginning and end tokens around a text where the file asks for it."""
    wanted = []
    for key, default in (("bos", add_bos), ("eos", False)):
        stated = file.optional_bool(f"{_KEY}add_{key}_token")
        token_id = file.optional_int(f"{_KEY}{key}_token_id")
        use = default if stated is None else stated
        if use and token_id is not None:
            wanted.append((_token(file, tokens, token_id, f"{key}_token_id"), token_id, key))
    if not wanted:
        return
    before = [token for token, _, key in wanted if key == "bos"]
    after = [token for token, _, key in wanted if key == "eos"]
    tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(token, token_id) for token, token_id, _ in wanted],
    )


def _token(file: GgufFile, tokens: list[str], token_id: int, key: str) -> str:
    if not 0 <= token_id < len(tokens):
        raise ImportModelError(
            f"{file.path}: {key} is {token_id}, the vocabulary has {len(tokens)} tokens",
            hint=_DAMAGED,
        )
    return tokens[token_id]
