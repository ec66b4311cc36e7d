"""What every target provides: data about the device, rules that choose kernels, and a build."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from llmc.dialect import Operator
from llmc.formats import QuantizedMatrix, WeightFormat

Array = npt.NDArray[np.generic]
Matrix = Array | QuantizedMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One call of a dialect operator, as a rule sees it.

    types holds the operands' types by name, a weight's being its logical matrix `[M, K]`
    (`[X, M, K]` for experts); max_tokens is the entry point's bound, tokens is set where T is
    static. `residual_ends` says that nothing else reads the operand of this name, then or later: a
    kernel may write over it.
    """

    op: Operator
    types: dict[str, relax.TensorType]
    max_tokens: int
    tokens: int | None
    num_groups: int
    page_size: int
    residual_ends: bool = False

    def extents(self, name: str) -> list[int]:
        """The extents of an operand; 0 where symbolic."""
        shape = self.types[name].shape
        return [int(e) if isinstance(e, tvm.tirx.IntImm) else 0 for e in shape]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What a rule chose: a PrimFunc that takes `operands` in this order, then its fresh outputs.

    "weight" among the operands stands for all packed arrays. in_place names, for each output, the
    operand it overwrites, or None for a fresh tensor.
    """

    func: tvm.tirx.PrimFunc
    rule: str
    operands: tuple[str, ...]
    in_place: tuple[str | None, ...] = (None,)

    @classmethod
    def of(
        cls,
        func: tvm.tirx.PrimFunc,
        site: Site,
        order: tuple[str, ...],
        in_place: tuple[str | None, ...] = (None,),
    ) -> Kernel:
        """The kernel on those operands of `order` that the call has; dispatch names the rule."""
        present = tuple(n for n in order if n in site.types)
        return cls(func=func, rule="", operands=present, in_place=in_place)


KernelRule = Callable[[Site], Kernel | None]
ScheduleRule = Callable[[tvm.tirx.PrimFunc], tvm.tirx.PrimFunc | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPart:
    """One array of a packed weight."""

    suffix: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationBlocks:
    """How a target's integer products want their activations (see dialect.QuantizeActivations)."""

    block: int
    unit: int
    factor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Functions that choose tokens on the device: docs/artifact.md has their signatures.

    Relax functions of the symbolic extents L (rows of logits) and R (rows to choose from), and
    their kernels, all of which are the rule's.
    """

    rule: str
    module: tvm.IRModule


class Target(Protocol):
    """A device to compile for."""

    name: str
    device_kind: str
    tvm_target: tvm.target.Target
    library_name: str
    layout: str
    panel: int  # rows of a weight that are packed together, and alone
    page_size: int
    narrow_products: frozenset[str]  # of int8 and bfloat16: what it multiplies faster than float32
    lacking_formats: frozenset[str]  # names of weight formats that its kernels do not decode
    few_tokens: int  # largest T of the entry point for small batches
    lazy_memory: bool  # memory that nothing has written to takes none
    pass_options: dict[str, Any]  # of the PassContext in which its code is generated
    level: str  # names it among its alternatives; empty where it has none
    alternatives: Sequence[Target]  # for lesser devices: same weights and caches, own libraries
    kernel_rules: Sequence[tuple[str, KernelRule]]
    schedule_rules: Sequence[tuple[str, ScheduleRule]]

    def sampling(self, vocab_size: int) -> Sampling | None:
        """Functions over logits `[L, vocab_size]`; None where the host chooses tokens."""

    def key_page(self, kv_heads: int, head_dim: int, kv_dtype: str) -> list[int]:
        """Shape of a page of keys in a cache tensor of kv_dtype."""

    def value_page(self, kv_heads: int, head_dim: int, kv_dtype: str) -> list[int]:
        """Shape of a page of values in a cache tensor of kv_dtype."""

    def activation_blocks(self, fmt: WeightFormat, features: int) -> ActivationBlocks | None:
        """For products with `fmt` weights of that many input features; None: in floats only."""

    def fuses(self, fmt: WeightFormat, m: int, k: int, max_tokens: int) -> bool:
        """Whether its rules take dialect.FusedLinear with a weight `[m, k]` of `fmt`, in the entry
        point of so many tokens.
        """

    def packed_parts(self, fmt: WeightFormat, shape: Sequence[int]) -> list[PackedPart]:
        """The arrays a matrix `[M, K]` or a stack `[X, M, K]` is packed into."""

    def pack(self, fmt: WeightFormat, matrix: Matrix) -> list[Array]:
        """The arrays of a matrix in the order of `packed_parts`, panels along their first axes."""

    def link(self, executable: tvm.runtime.Executable, path: Path) -> list[str]:
        """Writes the library that the runtime loads; returns the features that its code needs."""
