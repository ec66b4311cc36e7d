"""A projection on tensor cores: x `[1, T, K]` times a packed matrix `[M, K]`, bias and residual.

Activations are rounded to the type that is multiplied (bfloat16 for bf16 weights, else float16,
where what is too large becomes the largest number) by a launch of their own, which also puts them
into the order of tensor_cores.cuh; sums are float32. The number of tokens decides at run time which
of the plan's kernels follows.
"""

from __future__ import annotations

from typing import Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, kernel
from llmc.targets.cuda.kernels.source import NAMES, source
from llmc.targets.cuda.parameters import FewTokens, ManyTokens, Step, TensorCorePlan
from llmc.targets.gpu.kernels.block import launch, quotient_up, rows_of, workspace
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import ceildiv, chunk_features, num_chunks, stored_groups

Expr = Any

CHUNKS = 4
"""Of a superblock: one for each thread of a quad."""
_SLAB = 32  # features of a superblock that a thread's 16 bytes of activations belong to
_ARRANGE_THREADS = 256


def multiplies(fmt: WeightFormat) -> bool:
    """Whether the tensor cores multiply weights of this format."""
    return fmt.bits <= 16


def linear_tensor_cores(
    fmt: WeightFormat,
    m: int,
    k: int,
    *,
    bias: bool,
    residual: bool,
    dtype: str,
    vector_dtype: str,
    plan: TensorCorePlan[Step],
) -> PrimFunc:
    """The product for any number of tokens; buffers as in targets/gpu/kernels/linear.py.

    Raises CompileError where the format cannot hold k features.
    """
    with kernel("linear_tensor_cores") as built:
        call = _Call(fmt, m, k, bias, residual, dtype, vector_dtype, plan)
        call.arrange()
        _choose(call, 0)
    return built.func


def _choose(call: _Call, number: int) -> None:
    """The first kernel from `number` on that serves as many tokens."""
    if number == len(call.plan.steps):
        call.multiply(call.plan.last)
        return
    most, step = call.plan.steps[number]
    with T.If(call.tokens <= i64(most)):
        with T.Then():
            call.multiply(step)
        with T.Else():
            _choose(call, number + 1)


class _Call:
    """The kernel's buffers, and launches on them."""

    def __init__(
        self,
        fmt: WeightFormat,
        m: int,
        k: int,
        bias: bool,
        residual: bool,
        dtype: str,
        vector_dtype: str,
        plan: TensorCorePlan[Step],
    ) -> None:
        self.plan = plan
        self.tokens = rows_of(None)
        self._fmt, self._m, self._k = fmt, m, k
        self._data, self._vector = NAMES[dtype], NAMES[vector_dtype]
        self._epilogue = (bias, residual)
        self._x = argument("x", (1, self.tokens, k), dtype)
        self._weights = Weights.arguments(fmt, m, k)
        self._bias = argument("bias", (m,), vector_dtype) if bias else None
        self._residual = argument("residual", (1, self.tokens, m), dtype) if residual else None
        self._y = argument("y", (1, self.tokens, m), dtype)
        depth = max(step.depth for step in plan.kernels)
        blocks = ceildiv(ceildiv(num_chunks(fmt, k), CHUNKS), depth) * depth
        self._slabs = blocks * CHUNKS * chunk_features(fmt) // _SLAB
        self._padded = T.Bind(self._pad())
        self._arranged = workspace((self._padded * i64(self._slabs * _SLAB),), "float16")

    def _pad(self) -> Expr:
        """Tokens filled up to whole tiles of the kernel that serves them."""
        *steps, last = self.plan.kernels
        padded = quotient_up(self.tokens, last.tokens) * i64(last.tokens)
        for (most, _), step in reversed(list(zip(self.plan.steps, steps, strict=True))):
            whole = quotient_up(self.tokens, step.tokens) * i64(step.tokens)
            padded = T.Select(self.tokens <= i64(most), whole, padded)
        return padded

    def arrange(self) -> None:
        """Launches what rounds and orders the activations."""
        pieces = quotient_up(self._padded * i64(CHUNKS), _ARRANGE_THREADS)
        with launch((self._slabs, pieces), (_ARRANGE_THREADS,)) as (slab, part, _):
            name = f"llmc::arrange_activations<{cuda_format(self._fmt)}, {self._data}>"
            arguments = [start(self._x), start(self._arranged), _int(self._k)]
            arguments += [_int(n) for n in (self.tokens, self._padded, slab, part)]
            T.evaluate(cuda_func_call(name, *arguments, source_code=source("tensor_cores")))

    def multiply(self, step: Step) -> None:
        """Launches a product on what `arrange` left."""
        rows, tokens = ceildiv(self._m, step.rows), quotient_up(self.tokens, step.tokens)
        # Blocks of the same rows follow each other: the weights come from memory once.
        with launch((tokens, rows), (step.threads,)) as (token_tile, row_tile, _):
            memory = T.alloc_buffer(
                [i64(shared_bytes(self._fmt, step))], "uint8", scope="shared.dyn"
            )
            numbers = (self._m, self._k, self._weights.chunks, _groups(self._fmt, self._k))
            dynamic = (self.tokens, self._padded, row_tile, token_tile)
            T.evaluate(
                cuda_func_call(
                    self._name(step),
                    *(start(buffer) for buffer in self._buffers()),
                    *(_int(n) for n in (*numbers, *dynamic)),
                    start(memory),
                    source_code=source("tensor_cores"),
                )
            )

    def _buffers(self) -> list[Expr]:
        """codes, scales, mins, activations, bias, residual, y; y in place of what is absent."""
        parts: list[Expr] = [*self._weights.buffers, *[self._y] * 2][:3]
        optional = [self._y if b is None else b for b in (self._bias, self._residual)]
        return [*parts, self._arranged, *optional, self._y]

    def _name(self, step: Step) -> str:
        """The device function with its template's arguments."""
        fmt = cuda_format(self._fmt)
        bias, residual = (str(present).lower() for present in self._epilogue)
        common = f"{fmt}, {bias}, {residual}, {self._data}, {self._vector}"
        if isinstance(step, FewTokens):
            return f"llmc::multiply_few<{common}, {step.tokens}, {step.warps}, {step.ahead}>"
        sizes = (step.rows, step.tokens, step.warp_rows, step.warp_tokens, step.depth, step.stages)
        tile = ", ".join(str(size) for size in sizes)
        return f"llmc::multiply_tile<{common}, llmc::Tile<{fmt}, {tile}>>"


def shared_bytes(fmt: WeightFormat, step: Step) -> int:
    """Shared memory of a block, as tensor_cores.cuh divides it."""
    if isinstance(step, FewTokens):
        return step.warps // 2 * step.tokens * step.rows * 4
    features = CHUNKS * chunk_features(fmt)
    bytes_ = step.depth * (CHUNKS * step.rows * 16 + features * step.tokens * 2)
    if not fmt.is_float and fmt.group:
        size = 4 if fmt.scale_dtype == "float32" else 2
        scales = step.depth * max(1, features // fmt.group) * (step.rows * size + 32)
        bytes_ += scales * (2 if fmt.has_min else 1)
    return bytes_ * step.stages


def cuda_format(fmt: WeightFormat) -> str:
    """The format as a type of tensor_cores.cuh."""
    kind = NAMES[fmt.float_dtype or "float16"]
    signed = str(fmt.code_dtype == "int8").lower()
    scale = NAMES[fmt.scale_dtype]
    least = str(fmt.has_min).lower()
    numbers = f"{fmt.bits}, {signed}, {fmt.zero_point}, {scale}, {fmt.group}, {least}"
    numbers += ", true" if fmt.float_codes else ""
    return f"llmc::Format<{kind}, {numbers}>"


def _groups(fmt: WeightFormat, k: int) -> int:
    """Scales stored for a row."""
    return 0 if fmt.is_float else stored_groups(fmt, k)


def start(buffer: Expr) -> Expr:
    """Where a buffer begins: all of it is used, while an element's address would stand for one."""
    return buffer.data


def _int(value: int | Expr) -> Expr:
    return T.int32(value) if isinstance(value, int) else T.Cast("int32", value)
