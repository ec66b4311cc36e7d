"""The manifest of an artifact folder (`llmc.json`): the only thing compiler and runtime share.

docs/artifact.md describes the folder. Reading is strict: an unknown or missing field, a wrong type or a newer
schema is an ArtifactError that names the field.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.errors import ArtifactError

SCHEMA_VERSION = 1
MANIFEST_FILE = "llmc.json"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
REFERENCE_FILE = "reference.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What was compiled."""

    name: str
    architecture: str
    vocab_size: int
    context_length: int  # tokens
    hidden_size: int
    num_layers: int
    num_parameters: int
    bos_token_id: int | None
    stop_token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryPoint:
    """One compiled function with the step signature, for steps of at most max_tokens tokens."""

    name: str
    max_tokens: int
    max_sequences: int
    max_logits_rows: int
    workspace_bytes: int  # planned activations and kernel scratch at the upper bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers that share one block table: same visibility of the past."""

    name: str
    window: int | None  # tokens; None sees everything
    page_size: int  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTensor:
    """A tensor that lives between steps; the runtime allocates `[num_pages, *page_shape]` and never reads it."""

    name: str
    layer: int
    group: int  # index into groups
    kind: str  # "paged"
    dtype: str
    page_shape: list[int]
    page_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTensor:
    """One argument of the entry points, in argument order; `name` is its key in `file`."""

    name: str
    file: str
    dtype: str
    shape: list[int]
    format: str  # e.g. "f32", "q4_1"
    layout: str  # the packing that the kernels read, e.g. "plain", "panel16"
    sources: list[str]  # names of the model's tensors it was made from
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One library of the artifact and the device it needs."""

    library: str
    device_kind: str  # a key of runtime/devices
    target: str
    features: list[str]  # e.g. ["avx2", "fma", "f16c"]; all are required


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes the artifact needs, known before it starts."""

    weights_bytes: int
    workspace_bytes: int  # the largest entry point's
    logits_bytes: int  # the largest step's output
    kv_bytes_per_token: int  # over all groups, as long as no window has passed


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelInfo:
    """One compiled kernel and the rule that chose it."""

    name: str
    rule: str
    num_calls: int  # over all entry points


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyTolerance:
    """What `llmc verify` accepts: difference of log-probabilities against the float32 reference."""

    max_mean_abs: float  # mean over all scored positions, of the reference's top token
    max_abs: float  # of any scored position


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole of `llmc.json`."""

    schema_version: int = SCHEMA_VERSION
    llmc_version: str
    tvm_version: str
    created: str  # ISO 8601, UTC
    model: ModelInfo
    quantization: str
    compute_dtype: str
    activation_dtype: str  # what the quantized products multiply with
    kv_dtype: str
    entry_points: list[EntryPoint]  # by ascending max_tokens
    groups: list[CacheGroup]
    caches: list[CacheTensor]
    weights: list[WeightTensor]
    variants: list[Variant]
    memory: MemoryPlan
    kernels: list[KernelInfo]
    verify: VerifyTolerance
    ranks: int = 1
    files: dict[str, str] = field(default_factory=dict)  # relative path -> SHA-256, all but the manifest

    @property
    def max_batch_tokens(self) -> int:
        """Most tokens one step can take."""
        return self.entry_points[-1].max_tokens

    @property
    def max_sequences(self) -> int:
        """Most sequences one step can take."""
        return self.entry_points[-1].max_sequences

    @property
    def max_logits_rows(self) -> int:
        """Most logits rows one step can give."""
        return self.entry_points[-1].max_logits_rows

    def to_json(self) -> str:
        """The manifest as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parses and checks `text`; raises ArtifactError naming the first field that is wrong."""
        try:
            data = json.loads(text)
        except ValueError as exc:
            raise ArtifactError(
                f"{MANIFEST_FILE} is not JSON: {exc}", hint="compile the model again"
            ) from exc
        version = data.get("schema_version") if isinstance(data, dict) else None
        if type(version) is not int:
            raise ArtifactError(f"{MANIFEST_FILE} has no schema_version; not an llmc artifact")
        if version != SCHEMA_VERSION:
            newer = version > SCHEMA_VERSION
            raise ArtifactError(
                f"artifact schema {version}, this llmc reads schema {SCHEMA_VERSION}",
                hint="upgrade llmc" if newer else "compile the model again with this llmc",
            )
        manifest: Manifest = _decode(cls, data, "")
        if not manifest.entry_points:
            raise ArtifactError(f"{MANIFEST_FILE}: entry_points is empty")
        return manifest

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Reads `directory/llmc.json`."""
        path = directory / MANIFEST_FILE
        if not path.is_file():
            what = "no such folder" if not directory.exists() else f"no {MANIFEST_FILE} in it"
            raise ArtifactError(
                f"{directory}: {what}", hint="give a folder that `llmc compile` wrote"
            )
        return cls.from_json(path.read_text(encoding="utf-8"))

    def check_files(self, directory: Path) -> None:
        """Compares every file with its SHA-256; raises ArtifactError naming the first that differs."""
        for name, expected in self.files.items():
            path = directory / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ArtifactError(f"{MANIFEST_FILE}: file name {name!r} leaves the artifact")
            if not path.is_file():
                raise ArtifactError(f"{path}: missing", hint="copy the whole artifact folder again")
            actual = sha256_of(path)
            if actual != expected:
                raise ArtifactError(
                    f"{path}: SHA-256 is {actual[:16]}…, the manifest says {expected[:16]}…",
                    hint="the file is damaged: copy or compile the artifact again",
                )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _decode(expected: Any, value: Any, where: str) -> Any:  # noqa: ANN401 - mirrors JSON's types
    """Turns JSON `value` into the annotated type `expected`."""
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        hints = typing.get_type_hints(expected)
        required = {
            f.name
            for f in dataclasses.fields(expected)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        for name in sorted(set(value) - set(hints)):
            raise ArtifactError(f"{MANIFEST_FILE}: unknown field {_join(where, name)!r}")
        for name in sorted(required - set(value)):
            raise ArtifactError(f"{MANIFEST_FILE}: missing field {_join(where, name)!r}")
        fields = {name: _decode(hints[name], item, _join(where, name)) for name, item in value.items()}
        return expected(**fields)  # type: ignore[operator]
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is list:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        return [_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        return {key: _decode(args[1], item, _join(where, key)) for key, item in value.items()}
    if origin is types.UnionType:
        if value is None:
            return None
        return _decode(args[0], value, where)
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise _wrong(where, expected.__name__, value)
    return value


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _wrong(where: str, expected: str, value: object) -> ArtifactError:
    return ArtifactError(f"{MANIFEST_FILE}: {where!r} is {str(value)[:60]!r}, expected {expected}")
