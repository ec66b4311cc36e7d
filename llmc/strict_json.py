"""Strict reading of an artifact's JSON files into dataclasses: what is not declared is an error."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from llmc.errors import ArtifactError


def read_text(path: Path) -> str:
    """The file's text, line ends as they are; raises ArtifactError where it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as exc:
        raise ArtifactError(
            f"{path}: not UTF-8 at byte {exc.start}",
            hint="the file is damaged: copy or compile the artifact again",
        ) from exc


def load_object(text: str, *, file: str, schema_version: int) -> dict[str, Any]:
    """Parses `text` as a JSON object with this `schema_version`.

    Raises ArtifactError, naming `file`, where it is not JSON (NaN and Infinity are not), is not an
    object, or has another schema version.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"{file} is not JSON: {exc}", hint="compile the model again") from exc
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int:
        raise ArtifactError(f"{file} has no schema_version; not an llmc artifact")
    if version != schema_version:
        newer = version > schema_version
        raise ArtifactError(
            f"{file} has schema {version}, this llmc reads schema {schema_version}",
            hint="upgrade llmc" if newer else "compile the model again with this llmc",
        )
    return typing.cast("dict[str, Any]", data)


def decode(expected: Any, value: Any, *, file: str, where: str = "") -> Any:  # noqa: ANN401 - mirrors JSON's types
    """Turns JSON `value` into the annotated type `expected`.

    `expected` is a dataclass, `list[…]`, `dict[str, …]`, `… | None`, or a JSON scalar's type.
    Raises ArtifactError naming `file` and the first field that is unknown, missing or mistyped.
    """
    if dataclasses.is_dataclass(expected):
        return _decode_dataclass(expected, value, file=file, where=where)
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is list:
        if not isinstance(value, list):
            raise _wrong(file, where, "a list", value)
        return [
            decode(args[0], item, file=file, where=f"{where}[{i}]") for i, item in enumerate(value)
        ]
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(file, where, "an object", value)
        return {
            key: decode(args[1], item, file=file, where=_join(where, key))
            for key, item in value.items()
        }
    if origin is types.UnionType:
        if value is None:
            return None
        return decode(args[0], value, file=file, where=where)
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise _wrong(file, where, expected.__name__, value)
    return value


def _decode_dataclass(expected: Any, value: object, *, file: str, where: str) -> Any:  # noqa: ANN401
    if not isinstance(value, dict):
        raise _wrong(file, where, "an object", value)
    hints, required = _fields(expected)
    for name in sorted(value.keys() - hints.keys()):
        raise ArtifactError(f"{file}: unknown field {_join(where, name)!r}")
    for name in sorted(required - value.keys()):
        raise ArtifactError(f"{file}: missing field {_join(where, name)!r}")
    fields = {
        name: decode(hints[name], item, file=file, where=_join(where, name))
        for name, item in value.items()
    }
    return expected(**fields)


@cache
def _fields(expected: Any) -> tuple[dict[str, Any], frozenset[str]]:  # noqa: ANN401
    """Types of a dataclass's fields, and the names of those without a default."""
    required = frozenset(
        f.name
        for f in dataclasses.fields(expected)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    return typing.get_type_hints(expected), required


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _wrong(file: str, where: str, expected: str, value: object) -> ArtifactError:
    return ArtifactError(f"{file}: {where!r} is {str(value)[:60]!r}, expected {expected}")
