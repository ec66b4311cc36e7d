"""The model's own sampling defaults, as `generation_config.json` states them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from llmc.errors import ArtifactError, RequestError
from llmc.runtime.sampling_params import SamplingParams
from llmc.strict_json import read_text

_SAMPLED = ("temperature", "top_k", "top_p", "min_p")
_ALWAYS = ("repetition_penalty",)


def load_sampling_defaults(path: Path) -> dict[str, Any]:
    """Fields of SamplingParams that hold where a request does not say otherwise.

    The file's fields mean what they do to transformers, which wrote it: without `do_sample` the
    model is greedy, and its temperature, top_k, top_p and min_p are not looked at. A field that is
    not stated (null included) is left to SamplingParams, other fields are not read. Raises
    ArtifactError for a value that SamplingParams does not take.
    """
    hint = "correct it in the model's folder and compile again"
    try:
        stated = json.loads(read_text(path), parse_constant=_refuse)
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"{path}: not JSON: {exc}", hint=hint) from exc
    if not isinstance(stated, dict):
        raise ArtifactError(f"{path}: expected an object, got {str(stated)[:60]!r}", hint=hint)
    do_sample = stated.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise ArtifactError(
            f"{path}: do_sample: got {str(do_sample)[:60]!r}, expected true or false", hint=hint
        )
    found: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    for name in _ALWAYS + (_SAMPLED if do_sample else ()):
        if stated.get(name) is not None:
            found[name] = stated[name]
    try:
        SamplingParams(**found)
    except RequestError as exc:
        raise ArtifactError(f"{path}: {exc.message}", hint=hint) from exc
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
