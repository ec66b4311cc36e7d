"""The names that files and users bring (`names.json`), typed: code never compares one itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """A model that a Python package carries."""

    package: str
    install: str  # what brings the package


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitScheme:
    """How a byte-level tokenizer cuts text before merging."""

    splits: list[str]  # regexes, each applied to the pieces of the one before
    ignore_merges: bool = False  # a piece that is a token is taken whole
    add_bos: bool = False  # where the file does not say


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(
        files("llmc.models").joinpath("names.json").read_text(encoding="utf-8")
    )
    return table


def demos() -> dict[str, Demo]:
    """Demo name -> the package that carries its weights."""
    return {name: Demo(**fields) for name, fields in _table()["demos"].items()}


def gguf_tokenizer_kinds() -> dict[str, str]:
    """`tokenizer.ggml.model` -> "byte_level", "sentencepiece" or "unigram"."""
    return dict(_table()["gguf_tokenizers"])


def gguf_split_schemes() -> dict[str, SplitScheme]:
    """`tokenizer.ggml.pre` -> how it splits."""
    schemes = {name: SplitScheme(**fields) for name, fields in _table()["split_schemes"].items()}
    return {name: schemes[scheme] for name, scheme in _table()["gguf_pretokenizers"].items()}


def rope_factor_schemes() -> list[dict[str, Any]]:
    """Rotary scalings that a GGUF file states only as a tensor of factors."""
    return [dict(scheme) for scheme in _table()["rope_factor_schemes"]]
