"""The tokenizer and chat template of a Hugging Face folder, as JSON and text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from llmc.errors import ImportModelError, UnsupportedError
from llmc.models.json_file import read_json

_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
_HINT = "the file is damaged: download it again"


def tokenizer_json_of(path: Path) -> bytes | None:
    """The folder's tokenizer, converted where it has only a slow one's files; None without any.

    Raises ImportModelError where tokenizer.json cannot be loaded, UnsupportedError where the slow
    tokenizer cannot be converted.
    """
    file = path / _TOKENIZER
    if file.is_file():
        raw = file.read_bytes()
        try:
            Tokenizer.from_buffer(raw)
        except Exception as exc:  # the library raises plain Exceptions
            raise ImportModelError(
                f"{file}: not a tokenizer: {str(exc)[:200]}",
                hint="the file is damaged or newer than this `tokenizers`:"
                " pip install -U tokenizers",
            ) from exc
        return raw
    slow = [found for pattern in _SLOW_FILES for found in sorted(path.glob(pattern))]
    return _converted(path, slow[0].name) if slow else None


def _converted(path: Path, slow: str) -> bytes:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
        text: str = tokenizer.backend_tokenizer.to_str()
    except Exception as exc:  # converters raise errors of many kinds
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        raise UnsupportedError(
            f"{path / slow}: cannot be converted to {_TOKENIZER}: {reason[:200]}",
            hint="put the model's tokenizer.json into the folder; some conversions need"
            " pip install sentencepiece protobuf tiktoken",
        ) from exc
    return text.encode()


def chat_template_of(path: Path) -> str | None:
    """chat_template.jinja, or the (default) template of tokenizer_config.json."""
    file = path / _TEMPLATE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as exc:
            raise ImportModelError(f"{file}: not UTF-8: {exc.reason}", hint=_HINT) from exc
    template = (read_json(path / _TOKENIZER_CONFIG) or {}).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {
            item.get("name"): item.get("template") for item in template if isinstance(item, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None


def end_token_id_of(path: Path, tokenizer_json: bytes | None) -> list[int]:
    """The id of tokenizer_config.json's `eos_token`; empty where it states none.

    Chat models often end a turn with it while config.json still names the base model's token.
    """
    token = (read_json(path / _TOKENIZER_CONFIG) or {}).get("eos_token")
    if isinstance(token, dict):  # an AddedToken
        token = token.get("content")
    if tokenizer_json is None or not isinstance(token, str):
        return []
    found = Tokenizer.from_buffer(tokenizer_json).token_to_id(token)
    return [] if found is None else [found]
