"""JSON objects out of a model's folder: bounded, and never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmc.errors import ImportModelError

_MAX_BYTES = 256 << 20
_HINT = "the file is damaged: download it again"
_SPECIAL_FLOATS = ("Infinity", "-Infinity", "NaN")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file, ImportModelError where it is not one."""
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ImportModelError(f"{path}: {size} bytes, expected at most {_MAX_BYTES}", hint=_HINT)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"), object_hook=_special_float)
    except (ValueError, RecursionError) as exc:
        raise ImportModelError(f"{path}: not JSON: {exc}", hint=_HINT) from exc
    if not isinstance(fields, dict):
        raise ImportModelError(
            f"{path}: is {str(fields)[:60]!r}, expected a JSON object", hint=_HINT
        )
    return fields


def _special_float(fields: dict[str, Any]) -> Any:  # noqa: ANN401 - a value of a JSON document
    """Infinities, as transformers writes them: `{"__float__": "Infinity"}`."""
    if len(fields) == 1 and fields.get("__float__") in _SPECIAL_FLOATS:
        return float(fields["__float__"])
    return fields
