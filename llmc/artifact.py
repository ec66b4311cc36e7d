"""The manifest of an artifact folder (`llmc.json`): the only thing compiler and runtime share.

docs/artifact.md describes the folder. Reading is strict: an unknown or missing field, a wrong type
or a newer schema is an ArtifactError that names the field; so is any byte that was changed after
the file was written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.errors import ArtifactError
from llmc.strict_json import decode, load_object, read_text

SCHEMA_VERSION = 4
MANIFEST_FILE = "llmc.json"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_CONFIG_FILE = "generation_config.json"
REFERENCE_FILE = "reference.json"
# What weights and cache tensors are made of; bfloat16 and packed codes are stored as integers.
TENSOR_DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "uint16")


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
    workspace_bytes: int  # activations, kernel scratch and results at the upper bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers that share one block table: same visibility of the past."""

    name: str
    window: int | None  # tokens; None sees everything
    page_size: int  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTensor:
    """A tensor that lives between steps; the runtime allocates `[num_pages, *page_shape]`."""

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
    workspace_bytes: int  # of all entry points and sampling functions, which share it
    thread_bytes: int  # scratch of kernels, of each thread that runs them
    logits_bytes: int  # the largest step's output
    kv_bytes_per_token: int  # over all groups, as long as no window has passed


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSampling:
    """The library has functions that choose tokens where the logits are: docs/artifact.md."""

    max_rows: int  # of logits, and to choose from
    workspace_bytes: int  # planned, of the larger function


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelInfo:
    """One compiled kernel and the rule that chose it."""

    name: str
    rule: str
    num_calls: int  # over all entry points
    num_scratch: int  # of its arguments, the last ones: memory it uses and leaves


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
    sampling: DeviceSampling | None  # None: the host chooses tokens
    verify: VerifyTolerance
    ranks: int = 1
    # Relative path -> SHA-256 of every file but the manifest.
    files: dict[str, str] = field(default_factory=dict)

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
        """The file's text: indented JSON, its last field the SHA-256 of all others."""
        return _sealed(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parses and checks `text`; raises ArtifactError naming the first field that is wrong, or
        where the text is not, byte for byte, what `to_json` wrote.
        """
        data = load_object(text, file=MANIFEST_FILE, schema_version=SCHEMA_VERSION)
        if _SEAL not in data:
            raise ArtifactError(f"{MANIFEST_FILE}: missing field {_SEAL!r}")
        stated = data.pop(_SEAL)
        # Fields first: where one is wrong, its name says more than a hash.
        manifest: Manifest = decode(cls, data, file=MANIFEST_FILE)
        if text != _sealed(data):
            digest = _digest(data)
            how = "its fields are right, but written differently"
            if stated != digest:
                how = f"the SHA-256 of its fields is {digest[:16]}…, it says {str(stated)[:16]}…"
            raise ArtifactError(
                f"{MANIFEST_FILE} was changed: {how}",
                hint="the file is damaged: copy or compile the artifact again",
            )
        if not manifest.entry_points:
            raise ArtifactError(f"{MANIFEST_FILE}: entry_points is empty")
        dtypes = {t.name: t.dtype for t in manifest.weights}
        dtypes |= {t.name: t.dtype for t in manifest.caches}
        for name, dtype in dtypes.items():
            if dtype not in TENSOR_DTYPES:
                raise ArtifactError(
                    f"{MANIFEST_FILE}: {name} has dtype {dtype!r}, expected one of "
                    f"{', '.join(TENSOR_DTYPES)}"
                )
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
        return cls.from_json(read_text(path))

    def check_file(self, directory: Path, name: str) -> None:
        """Checks the SHA-256 of one of `files`; raises ArtifactError where it differs."""
        path = self.path_of(directory, name)
        self.check_digest(path, name, sha256_of(path))

    def path_of(self, directory: Path, name: str) -> Path:
        """Where one of `files` is; raises ArtifactError where it is not, or is outside."""
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{MANIFEST_FILE}: file name {name!r} leaves the artifact")
        if not path.is_file():
            raise ArtifactError(f"{path}: missing", hint="copy the whole artifact folder again")
        return path

    def check_digest(self, path: Path, name: str, actual: str) -> None:
        """Raises ArtifactError where `actual` is not the SHA-256 of one of `files`."""
        expected = self.files[name]
        if actual != expected:
            raise ArtifactError(
                f"{path}: SHA-256 is {actual[:16]}…, the manifest says {expected[:16]}…",
                hint="the file is damaged: copy or compile the artifact again",
            )


_SEAL = "sha256"


def _sealed(fields: dict[str, Any]) -> str:
    """The text of a manifest with these fields; there is one text only for the same fields."""
    return json.dumps({**fields, _SEAL: _digest(fields)}, indent=1) + "\n"


def _digest(fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
