"""Where a model comes from: `open_source` turns a path or name into config, tensors and tokenizer.

Nothing but headers is read here; weights are read one tensor at a time, when somebody asks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy.typing as npt

from llmc.errors import ImportModelError
from llmc.formats import QuantizedMatrix
from llmc.models.names import demos

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Array: TypeAlias = npt.NDArray[Any]

DEMO_PREFIX = "demo:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken", "*.txt"]
_HUB_SKIP = ["consolidated*", "original/*", "*/*"]


def _not_quantized() -> QuantizedMatrix | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensor:
    """One tensor of the checkpoint under the name of the model parameter it feeds.

    `stored` is how the file holds it: "f32", "bf16", "f16", or a GGUF type in lower case ("q4_1");
    tensors merged from several types name them all, joined by "+".
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    load: Callable[[], Array]
    load_quantized: Callable[[], QuantizedMatrix | None] = _not_quantized
    codes_transposed: bool = False  # the codes are those of the transposed matrix (of each expert)

    def read(self) -> Array:
        """The values in `shape`, maybe read-only: as stored, block types dequantized to float32.

        Raises ImportModelError where the file holds another shape.
        """
        values = self.load()
        if values.shape != self.shape:
            raise ImportModelError(
                f"tensor {self.name!r} has shape {list(values.shape)}, expected {list(self.shape)}",
                hint="the checkpoint does not fit its config: download both again",
            )
        return values

    def read_quantized(self) -> QuantizedMatrix | None:
        """The file's own codes, scales and minimums, rows in the model's order.

        A stack `[X, M, K]` comes as the matrix `[X·M, K]`. None for float tensors, and where the
        file's blocks cannot be put into the model's order; `read` serves these.
        """
        return self.load_quantized()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that can be compiled.

    `tensors` holds one entry for every name of `model.named_parameters()` (ties only once) and for
    the persistent buffers that the checkpoint carries.
    """

    name: str  # for the artifact, e.g. "tiny-135m-instruct"
    config: PreTrainedConfig
    tensors: Mapping[str, SourceTensor]
    tokenizer_json: bytes | None  # of the `tokenizers` library; None where there is no tokenizer
    chat_template: str | None
    bos_token_id: int | None
    stop_token_ids: list[int]
    generation_config: dict[str, Any] | None


def open_source(spec: str, *, weights: bool = True) -> ModelSource:
    """Opens a folder, a `.gguf` file, `demo:NAME` or a hub id `org/name`, in this order.

    Without `weights` a folder needs none: its tensors have shapes and cannot be read.

    Raises ImportModelError where the files are missing or damaged, UnsupportedError where they need
    something that is not supported.
    """
    # Imported here: transformers and torch take seconds, and a wrong path should not.
    if spec.startswith(DEMO_PREFIX):
        return _open_file(_demo_path(spec))
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(path, path.resolve().name, weights)
    if path.is_file():
        return _open_file(path)
    if _HUB_ID.fullmatch(spec) and path.suffix != ".gguf":
        return _open_folder(_download(spec, weights), spec.rpartition("/")[2], weights)
    raise ImportModelError(
        f"{spec}: no such file or folder",
        hint="give a model folder, a .gguf file, demo:NAME or a hub id such as org/name",
    )


def artifact_name(name: str) -> str:
    """`name` as a file name in lower case: letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "model"


def _open_file(path: Path) -> ModelSource:
    with path.open("rb") as file:
        magic = file.read(4)
    if path.suffix != ".gguf" and magic != b"GGUF":
        raise ImportModelError(
            f"{path}: neither a GGUF file nor a folder",
            hint="give the folder with config.json and *.safetensors, or a .gguf file",
        )
    from llmc.models.gguf_source import open_gguf

    return open_gguf(path)


def _open_folder(path: Path, name: str, weights: bool) -> ModelSource:
    from llmc.models.hf_folder import open_folder

    return open_folder(path, artifact_name(name), weights=weights)


def _demo_path(spec: str) -> Path:
    known = demos()
    demo = known.get(spec.removeprefix(DEMO_PREFIX))
    if demo is None:
        raise ImportModelError(
            f"unknown demo {spec!r}",
            hint="one of " + ", ".join(DEMO_PREFIX + name for name in known),
        )
    package = find_spec(demo.package)  # found, not imported: only its file is wanted
    for folder in (package and package.submodule_search_locations) or []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ImportModelError(
        f"{spec}: the Python package {demo.package!r} with its weights is not installed",
        hint=demo.install,
    )


def _download(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    skip = _HUB_SKIP if weights else [*_HUB_SKIP, "*.safetensors"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=skip))
    except Exception as exc:  # the client passes on the errors of several libraries
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        raise ImportModelError(
            f"{hub_id}: no such file or folder, and the download failed: {reason[:200]}",
            hint="check the name and the network, log in with `hf auth login` if the model is"
            " gated, or give a local folder",
        ) from exc
