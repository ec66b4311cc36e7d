"""The product of one token: RMSNorm before and a gated activation behind it where asked.

See gemv.cuh. Floats are multiplied as they are; codes by x in 16 bits, whose error is 2^-16 of the
largest of the features that share a scale.
"""

from __future__ import annotations

from typing import Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.formats import WeightFormat
from llmc.targets.cuda.kernels.source import NAMES, source
from llmc.targets.cuda.kernels.tensor_cores import CHUNKS, cuda_format, start
from llmc.targets.cuda.parameters import GemvPlan
from llmc.targets.gpu.kernels.block import argument, i64, kernel, launch
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import ceildiv, chunk_features, groups_per_chunk, stored_groups

TILE = 16
"""Output rows that a block makes at a time."""
GATES = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}


def takes(fmt: WeightFormat, m: int, k: int) -> bool:
    """Whether there is such a product: rows of x are read 16 bytes, and its eighths whole."""
    return fmt.bits <= 16 and not fmt.float_codes and k % 8 == 0 and m % (2 * TILE) == 0


def gemv(
    fmt: WeightFormat,
    m: int,
    k: int,
    *,
    norm: tuple[float, float] | None,
    gate: str | None,
    bias: bool,
    residual: bool,
    dtype: str,
    vector_dtype: str,
    norm_dtype: str,
    plan: GemvPlan,
) -> PrimFunc:
    """y `[1, 1, M]` (with `gate` `[1, 1, M / 2]`) = weight · x `[1, 1, K]`.

    Buffers in order: x, the norm's weight `[K]` where `norm` gives its epsilon and offset, the
    packed arrays, bias `[M]` and residual `[1, 1, M]` where asked, y.
    """
    outputs = m // 2 if gate else m
    with kernel("gemv") as built:
        x = argument("x", (1, 1, k), dtype)
        norms = argument("norm", (k,), norm_dtype) if norm else None
        weights = Weights.arguments(fmt, m, k)
        biases = argument("bias", (m,), vector_dtype) if bias else None
        residuals = argument("residual", (1, 1, outputs), dtype) if residual else None
        y = argument("y", (1, 1, outputs), dtype)
        stride = min(plan.blocks, ceildiv(outputs, TILE))
        with launch((stride,), (32 * plan.warps,)) as (block, _):
            memory = T.alloc_buffer([i64(shared_bytes(fmt, k, plan))], "uint8", scope="shared.dyn")
            parts: list[Any] = [*weights.buffers, y, y][:3]
            optional = [y if b is None else b for b in (x, norms, biases, residuals)]
            groups = 0 if fmt.is_float else stored_groups(fmt, k)
            flags = [str(b is not None).lower() for b in (norms, biases, residuals)]
            types = [NAMES[t] for t in (dtype, vector_dtype, norm_dtype)]
            template = [cuda_format(fmt), str(plan.warps), str(plan.ahead), flags[0]]
            template += [str(GATES[gate] if gate else 0), *flags[1:], *types]
            T.evaluate(
                cuda_func_call(
                    f"llmc::gemv<{', '.join(template)}>",
                    *(start(buffer) for buffer in (*parts, *optional, y)),
                    *(T.int32(n) for n in (m, k, weights.chunks, groups)),
                    *(T.float32(number) for number in norm or (0.0, 0.0)),
                    T.Cast("int32", block),
                    T.int32(stride),
                    start(memory),
                    source_code=source("tensor_cores") + source("gemv"),
                )
            )
    return built.func


def shared_bytes(fmt: WeightFormat, k: int, plan: GemvPlan) -> int:
    """Shared memory of a block, as gemv.cuh divides it."""
    features = ceildiv(k, CHUNKS * chunk_features(fmt)) * CHUNKS * chunk_features(fmt)
    sums = 2 * plan.warps * TILE * 4
    if fmt.is_float:
        return sums + features * 4
    part = chunk_features(fmt) // groups_per_chunk(fmt)
    return sums + features * 2 + features // part * 8
