"""What one call of a kernel has to read and compute at least, derived from its arguments.

Nothing about it is stored at compile time: weights and caches are recognised by their address, and
their shapes and formats are in the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.artifact import CacheTensor, Manifest, WeightTensor
from llmc.formats import FORMATS
from llmc.runtime.step import StepInputs

_BF16_STORAGE = "uint16"  # of caches
_INDEX_DTYPES = ("int32", "int64")
# Axes of a matrix by its layout; a stack of experts has one more.
_AXES = {"panel16": 3, "chunk32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """A tensor argument of a call."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int

    @classmethod
    def of(cls, tensor: Any) -> Argument:  # noqa: ANN401 - a tvm_ffi tensor
        """Describes a tvm_ffi tensor."""
        dtype = tensor.dtype
        num_bytes = math.prod(tensor.shape) * dtype.bits * dtype.lanes // 8
        return cls(
            address=tensor.data_ptr(),
            shape=tuple(tensor.shape),
            dtype=str(dtype),
            num_bytes=num_bytes,
        )

    @property
    def rows(self) -> int:
        """Elements of all axes but the last."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCost:
    """The least that a call moves and computes."""

    memory_bytes: float  # weights and KV pages: more than caches hold
    activation_bytes: float  # what other kernels of the step wrote or read a moment before or after
    operations: float  # multiplications and additions; 0 where they do not count
    precision: str  # of the factors: "int8", "bf16" or "f32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the machine can do."""

    memory_bytes_per_s: float
    cache_bytes_per_s: float
    operations_per_s: Mapping[str, float]  # by precision

    def peak(self, precision: str) -> float:
        """Operations a second: float32's where the machine has nothing for `precision`, endless
        where nothing was measured.
        """
        rates = self.operations_per_s
        return rates.get(precision) or rates.get("f32") or float("inf")

    def floor_s(self, cost: KernelCost) -> float:
        """The least seconds that `cost` takes."""
        return max(
            cost.memory_bytes / self.memory_bytes_per_s,
            cost.activation_bytes / self.cache_bytes_per_s,
            cost.operations / self.peak(cost.precision) if cost.operations else 0.0,
        )


class CostModel:
    """Derives the cost of calls of one loaded artifact's kernels."""

    def __init__(
        self, manifest: Manifest, *, caches: Sequence[int], weights: Sequence[int]
    ) -> None:
        """`caches` and `weights` are the tensors' addresses in the manifest's order."""
        self._manifest = manifest
        self._caches = dict(zip(caches, manifest.caches, strict=True))
        self._weights = dict(zip(weights, manifest.weights, strict=True))

    def cost(self, arguments: Iterable[Argument], inputs: StepInputs) -> KernelCost:
        """The cost of a call within the step `inputs`; the last argument is the kernel's result,
        its scratch left out.

        A product does 2·rows·M·K operations, padding included; a look-up reads its rows only;
        attention reads the visible tokens' pages once and computes two products with them; every
        other kernel moves its arguments.
        """
        unique = {a.address: a for a in arguments}
        weights = [self._weights[a] for a in unique if a in self._weights]
        caches = [self._caches[a] for a in unique if a in self._caches]
        others = [
            a for a in unique.values() if a.address not in self._weights.keys() | self._caches
        ]
        if caches:
            return self._cache_cost(caches, others, inputs)
        matrix = max(weights, key=lambda w: w.num_bytes, default=None)
        if matrix is not None and len(matrix.shape) > 1 and others:
            return _matrix_cost(matrix, weights, others)
        return KernelCost(
            memory_bytes=sum(w.num_bytes for w in weights),
            activation_bytes=_moved_bytes(others),
            operations=0,
            precision="f32",
        )

    def _cache_cost(
        self, caches: list[CacheTensor], others: list[Argument], inputs: StepInputs
    ) -> KernelCost:
        groups = self._manifest.groups
        token_bytes = sum(c.page_bytes / groups[c.group].page_size for c in caches)
        activation_bytes = sum(a.num_bytes for a in others)
        num_tokens = len(inputs.input_ids)
        if all(a.shape != inputs.block_tables.shape for a in others):  # it only writes
            return KernelCost(
                memory_bytes=num_tokens * token_bytes,
                activation_bytes=activation_bytes,
                operations=0,
                precision="f32",
            )
        visible, pairs = visible_tokens(inputs, groups[caches[0].group].window)
        query, result = others[0], others[-1]
        features = (math.prod(query.shape) + math.prod(result.shape)) / num_tokens
        # With narrower activations a target may round attention's factors, too.
        is_exact = self._manifest.activation_dtype == "float32"
        return KernelCost(
            memory_bytes=visible * token_bytes,
            activation_bytes=activation_bytes,
            operations=2 * pairs * features,
            precision="f32" if is_exact and caches[0].dtype != _BF16_STORAGE else "bf16",
        )


def _matrix_cost(
    matrix: WeightTensor, weights: list[WeightTensor], others: list[Argument]
) -> KernelCost:
    """A product with a matrix (or a stack of experts), or a look-up of its rows."""
    *inputs, result = others
    fmt = FORMATS[matrix.format]
    is_panel = matrix.layout == "panel16"  # which stores the planes of a code one by one
    num_weights = matrix.num_bytes * 8 / (fmt.planes[0] if is_panel else fmt.bits)
    memory_bytes: float = sum(w.num_bytes for w in weights)
    activation_bytes = sum(a.num_bytes for a in others)
    if all(a.dtype in _INDEX_DTYPES for a in inputs):  # token ids: a look-up
        share = min(1.0, result.rows * result.shape[-1] / num_weights)
        return KernelCost(
            memory_bytes=memory_bytes * share,
            activation_bytes=activation_bytes,
            operations=0,
            precision="f32",
        )
    if len(matrix.shape) > _AXES.get(matrix.layout, 2):
        # At most one expert a row; which ones rows share is in the data.
        num_experts = matrix.shape[0]
        memory_bytes *= min(1.0, result.rows / num_experts)
        num_weights /= num_experts
    if any(a.dtype in ("int8", "uint8") for a in inputs):
        precision = "int8"
    else:
        precision = "bf16" if fmt.float_dtype == "bfloat16" else "f32"
    return KernelCost(
        memory_bytes=memory_bytes,
        activation_bytes=activation_bytes,
        operations=2 * result.rows * num_weights,
        precision=precision,
    )


def _moved_bytes(arguments: list[Argument]) -> int:
    """Bytes of all; with row numbers among them it is a look-up, which reads no more than it
    writes, unless the result is numbers like these: those of the largest.
    """
    sizes = [a.num_bytes for a in arguments]
    indices = [a.dtype in _INDEX_DTYPES for a in arguments]
    if any(indices[:-1]) and not indices[-1]:
        sizes = [min(size, arguments[-1].num_bytes) for size in sizes]
    return sum(sizes)


def visible_tokens(inputs: StepInputs, window: int | None) -> tuple[int, int]:
    """(cached tokens that the step's sequences see, pairs of a new token and one it sees)."""
    q_lens = np.diff(inputs.q_starts).astype(np.int64)
    kv_lens = inputs.kv_lens.astype(np.int64)
    last = np.repeat(kv_lens - q_lens, q_lens)
    first_of_sequence = np.repeat(np.cumsum(q_lens) - q_lens, q_lens)
    seen = last + np.arange(len(last)) - first_of_sequence + 1
    if window is None:
        return int(kv_lens.sum()), int(seen.sum())
    read = np.minimum(kv_lens, window + q_lens - 1)
    return int(read.sum()), int(np.minimum(seen, window).sum())
