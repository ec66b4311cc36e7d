"""Quantizes a model with the help of a text: each product's inputs are seen before it is rounded.

The reference implementation reads the text once, all windows side by side. Every product that it
computes with a weight of the model is intercepted, whatever module it stands in: its inputs give
the weight's codes (`gptq.py`), and the product is computed with these. So each weight is rounded
for inputs that come from weights already rounded, in one pass and without knowing the model.

Four-bit formats only: eight bits lose too little to be worth the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch.overrides import TorchFunctionMode

from llmc.compiler.gptq import Activations, gptq
from llmc.compiler.quantizer import quantize
from llmc.compiler.schemes import Scheme
from llmc.compiler.streamed_model import Rows, StreamedModel
from llmc.compiler.weight_plan import WeightSpec
from llmc.compiler.weights import dequantized
from llmc.errors import UsageError
from llmc.formats import FORMATS, QuantizedMatrix, WeightFormat, concatenate
from llmc.models.source import ModelSource, SourceTensor

WINDOW = 256
"""Tokens: the scores of attention take memory by its square."""
MAX_WINDOWS = 64
_MIN_WINDOWS = 4

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The tensors of a model, with codes where a weight was calibrated.

    num_matrices counts the matrices to be quantized (each expert is one); rounded names those that
    saw too few tokens, or no product at all, and were rounded to nearest instead.
    """

    tensors: Mapping[str, SourceTensor]
    num_matrices: int
    rounded: list[str]

    @property
    def notes(self) -> list[str]:
        """What the user should know: which matrices the text could not help."""
        if not self.rounded:
            return []
        shown = ", ".join(self.rounded[:3]) + (", …" if len(self.rounded) > 3 else "")
        return [
            f"{len(self.rounded)} of {self.num_matrices} matrices saw too few tokens of the"
            f" calibration text and were rounded to nearest: {shown}"
        ]


def read_text(path: Path, scheme: Scheme) -> str:
    """The calibration text in a file; UsageError where it cannot be read, or not be used."""
    if scheme.keep or FORMATS[scheme.matrices].bits != 4:
        raise UsageError(
            f"--calibrate: {scheme.name} rounds nothing to 4 bits, so there is nothing to choose",
            hint="choose a scheme such as w4a16-g64, or leave out --calibrate",
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path}: not UTF-8 at byte {exc.start}") from exc
    except OSError as exc:
        raise UsageError(f"{path} cannot be read: {exc.strerror}") from exc


def windows_of(source: ModelSource, text: str) -> npt.NDArray[np.int64]:
    """Windows `[n, T]` of the text's tokens, spread evenly over it.

    Raises UsageError where the model has no tokenizer or the text is too short.
    """
    if source.tokenizer_json is None:
        raise UsageError("the model has no tokenizer, so no text can calibrate it")
    ids = Tokenizer.from_str(source.tokenizer_json.decode("utf-8")).encode(text).ids
    length = min(WINDOW, getattr(source.config, "max_position_embeddings", None) or WINDOW)
    num_windows = len(ids) // length
    if num_windows < _MIN_WINDOWS:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens, fewer than {_MIN_WINDOWS} windows of"
            f" {length}",
            hint=f"give a text of about {WINDOW * MAX_WINDOWS * 4 >> 10} KiB",
        )
    windows = np.array(ids[: num_windows * length], np.int64).reshape(num_windows, length)
    chosen = np.linspace(0, num_windows - 1, min(num_windows, MAX_WINDOWS)).round().astype(int)
    if source.bos_token_id is not None and ids[0] == source.bos_token_id:
        windows[:, 0] = ids[0]  # as the model begins every text
    picked: npt.NDArray[np.int64] = windows[chosen]
    return picked


def calibrate(
    source: ModelSource,
    specs: Mapping[str, WeightSpec],
    ids: npt.NDArray[np.int64],
    scratch: Path,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Calibration:
    """Quantizes every weight that `specs` (by tensor name) gives a 4-bit format of a scheme.

    The model reads windows `[n, T]` of token ids. The codes lie as files in the folder `scratch`
    for as long as the tensors are used: memory holds one module's weights and the activations of
    all windows. Raises UsageError where no weight has such a format.
    """
    wanted = {
        name: spec
        for name, spec in specs.items()
        if spec.format.startswith("w") and FORMATS[spec.format].bits == 4
    }
    if not wanted:
        raise UsageError(
            "nothing to calibrate: the scheme quantizes no weight to 4 bits",
            hint="choose a scheme such as w4a16-g64, or leave out --calibrate",
        )
    scratch.mkdir(parents=True, exist_ok=True)
    weights = {
        name: _Weight(source.tensors[name], spec, scratch / f"{index:05d}")
        for index, (name, spec) in enumerate(wanted.items())
    }
    num_matrices = sum(weight.num_matrices for weight in weights.values())

    def values(name: str) -> Float32 | Rows:
        if name in weights:
            return weights[name].values()
        return dequantized(name, specs[name], source.tensors)

    model = StreamedModel(source, values)
    with _Products(model, weights, lambda done: on_progress(done / num_matrices)):
        model.logits(ids, last=1)
    rounded = [name for weight in weights.values() for name in weight.finish()]
    calibrated = {name: weight.source() for name, weight in weights.items()}
    return Calibration(
        tensors={**source.tensors, **calibrated}, num_matrices=num_matrices, rounded=rounded
    )


class _Weight:
    """One tensor on its way to codes: a matrix, or a stack of experts."""

    def __init__(self, tensor: SourceTensor, spec: WeightSpec, path: Path) -> None:
        self.tensor = tensor
        self.spec = spec
        self.format = FORMATS[spec.format]
        self.num_matrices = tensor.shape[0] if len(tensor.shape) == 3 else 1
        rows, columns = tensor.shape[-2:]
        self.shape = (columns, rows) if spec.transposed else (rows, columns)
        self._path = path
        self._done: set[int] = set()
        self._rounded: list[str] = []

    def values(self) -> Float32:
        """The tensor as it is now, writable: codes' values where there are codes."""
        values = np.array(self.tensor.read(), np.float32)
        for index in self._done:
            self.matrix_in(values, index)[:] = self._read(index).dequantize()
        return values

    def matrix_in(self, values: Any, index: int) -> Any:  # noqa: ANN401 - an array or a torch.Tensor
        """The matrix `[M, K]` number `index` as a view of the tensor's `values`."""
        matrix = values[index] if len(self.tensor.shape) == 3 else values
        return matrix.T if self.spec.transposed else matrix

    def index_of(self, operand: torch.Tensor, parameter: torch.Tensor) -> int | None:
        """Which matrix of the loaded parameter `operand` `[M, K]` is a view of, if of a whole."""
        if operand.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
            return None
        index, rest = divmod(operand.storage_offset(), self.shape[0] * self.shape[1])
        strides = (1, self.shape[0]) if self.spec.transposed else (self.shape[1], 1)
        whole = rest == 0 and tuple(operand.shape) == self.shape and operand.stride() == strides
        return index if whole else None

    def quantize(self, operand: torch.Tensor, index: int, inputs: Activations) -> None:
        """Chooses the codes of matrix `index` and puts their values into `operand` `[M, K]`."""
        if index in self._done:
            return
        values = np.ascontiguousarray(operand.numpy())
        if inputs.num_rows * 4 < self.shape[1]:
            # So few rows say nothing of most directions: what they leave free is not free.
            self._rounded.append(self._name(index))
            matrix = quantize(values, self.format)
        else:
            matrix = gptq(values, self.format, inputs)
        self._write(index, matrix)
        operand.copy_(torch.from_numpy(matrix.dequantize()))

    def finish(self) -> list[str]:
        """Rounds what no product has asked for; names of all the matrices that were rounded."""
        missing = set(range(self.num_matrices)) - self._done
        if missing:
            values = np.asarray(self.tensor.read(), np.float32)
            for index in sorted(missing):
                matrix = np.ascontiguousarray(self.matrix_in(values, index))
                self._write(index, quantize(matrix, self.format))
                self._rounded.append(self._name(index))
        return self._rounded

    def source(self) -> SourceTensor:
        """The tensor with its codes; `read` still gives the original values."""
        return replace(
            self.tensor,
            stored=self.format.name,
            load_quantized=partial(_stacked, self._path, self.format, self.num_matrices),
            codes_transposed=self.spec.transposed,
        )

    def _name(self, index: int) -> str:
        return self.tensor.name if self.num_matrices == 1 else f"{self.tensor.name}[{index}]"

    def _write(self, index: int, matrix: QuantizedMatrix) -> None:
        path = _file(self._path, index)
        if matrix.mins is None:
            np.savez(path, codes=matrix.codes, scales=matrix.scales)
        else:
            np.savez(path, codes=matrix.codes, scales=matrix.scales, mins=matrix.mins)
        self._done.add(index)

    def _read(self, index: int) -> QuantizedMatrix:
        return _stored(self._path, self.format, index)


def _file(path: Path, index: int) -> Path:
    return path.with_name(f"{path.name}-{index}.npz")


def _stored(path: Path, fmt: WeightFormat, index: int) -> QuantizedMatrix:
    with np.load(_file(path, index), allow_pickle=False) as arrays:
        return QuantizedMatrix(
            format=fmt, codes=arrays["codes"], scales=arrays["scales"], mins=arrays.get("mins")
        )


def _stacked(path: Path, fmt: WeightFormat, num_matrices: int) -> QuantizedMatrix:
    return concatenate([_stored(path, fmt, index) for index in range(num_matrices)])


# Functions that compute `x · weightᵀ` or `x · weight`: which arguments are x and the weight.
_LINEAR = {torch.nn.functional.linear: (0, 1)}
_MATMUL = {
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.mm: (0, 1),
    torch.Tensor.mm: (0, 1),
    torch.addmm: (1, 2),
}


class _Products(TorchFunctionMode):  # type: ignore[misc] # torch is untyped
    """Quantizes each weight at the first product that reads it."""

    def __init__(
        self, model: StreamedModel, weights: dict[str, _Weight], on_done: Callable[[int], None]
    ) -> None:
        super().__init__()
        self._model = model
        self._weights = weights
        self._on_done = on_done
        self._done = 0
        self._seen: tuple[torch.Tensor, Activations] | None = None  # of the latest inputs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever func returns
        kwargs = kwargs or {}
        product = _product(func, args)
        if product is not None:
            self._quantize(*product)
        return func(*args, **kwargs)

    def _quantize(self, x: torch.Tensor, operand: torch.Tensor) -> None:
        """Quantizes the weight that `operand` `[M, K]` is, if it is one."""
        for name, parameter in self._model.loaded.items():
            weight = self._weights.get(name)
            index = None if weight is None else weight.index_of(operand, parameter)
            if weight is not None and index is not None:
                weight.quantize(operand, index, self._activations(x))
                self._done += 1
                self._on_done(self._done)
                return

    def _activations(self, x: torch.Tensor) -> Activations:
        """Of the inputs `[..., K]`; sibling products read the very same tensor."""
        if self._seen is None or self._seen[0] is not x:
            self._seen = None
            self._seen = (x, Activations.of(x.reshape(-1, x.shape[-1])))
        return self._seen[1]


def _product(
    func: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(x, weight `[M, K]`) of a call that is a product with a matrix."""
    linear = _LINEAR.get(func)
    places = linear or _MATMUL.get(func)
    if places is None or len(args) <= places[1]:
        return None
    x, weight = args[places[0]], args[places[1]]
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    return x, weight if linear else weight.T
