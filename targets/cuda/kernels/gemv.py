"""The product of one token: RMSNorm before and a gated activation behind it where asked.

See gemv.cuh and, for sm_90 alone, stream.cuh. Floats are multiplied as they are; codes by x in 16
bits, whose error is 2^-16 of the largest of the features that share a scale.
"""

from __future__ import annotations

from typing import Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, kernel
from llmc.targets.cuda.kernels.source import NAMES, source
from llmc.targets.cuda.kernels.tensor_cores import CHUNKS, cuda_format, start
from llmc.targets.cuda.parameters import CLUSTERS, STREAM_BYTES, GemvPlan, StreamPlan, gemv_plan
from llmc.targets.gpu.kernels.block import launch
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import (
    PANEL,
    ceildiv,
    chunk_features,
    groups_per_chunk,
    num_chunks,
    stored_groups,
)

TILE = 16
"""Output rows that a block makes at a time."""
_BARRIER_BYTES = 256
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
    plan: GemvPlan | StreamPlan,
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
        parts: list[Any] = [*weights.buffers, y, y][:3]
        optional = [y if b is None else b for b in (x, norms, biases, residuals)]
        flags = [str(b is not None).lower() for b in (norms, biases, residuals)]
        types = [NAMES[t] for t in (dtype, vector_dtype, norm_dtype)]
        operation = str(GATES[gate] if gate else 0)
        if isinstance(plan, StreamPlan):
            cluster, blocks = plan.cluster, plan.blocks
            numbers = (plan.chunks, plan.stages, cluster)
            kind = [cuda_format(fmt), *map(str, numbers), operation]
            template = [cuda_format(fmt), *flags, *types, f"llmc::Stream<{', '.join(kind)}>"]
            assert stream_bytes(fmt, m, k, plan, gate=gate is not None) <= STREAM_BYTES
            name, size = "stream", STREAM_BYTES
            code = source("tensor_cores") + source("gemv") + source("wide") + source("stream")
        else:
            cluster, blocks = 1, min(plan.blocks, ceildiv(outputs, TILE))
            template = [cuda_format(fmt), str(plan.warps), str(plan.ahead), flags[0]]
            template += [operation, *flags[1:], *types]
            name, size = "gemv", shared_bytes(fmt, k, plan)
            code = source("tensor_cores") + source("gemv")
        with launch((blocks,), (plan.threads,), cluster=cluster) as (block, _):
            memory = T.alloc_buffer([i64(size)], "uint8", scope="shared.dyn")
            groups = 0 if fmt.is_float else stored_groups(fmt, k)
            T.evaluate(
                cuda_func_call(
                    f"llmc::{name}<{', '.join(template)}>",
                    *(start(buffer) for buffer in (*parts, *optional, y)),
                    *(T.int32(n) for n in (m, k, weights.chunks, groups)),
                    *(T.float32(number) for number in norm or (0.0, 0.0)),
                    T.Cast("int32", block),
                    T.int32(blocks),
                    start(memory),
                    source_code=code,
                )
            )
    return built.func


def plan_for(
    fmt: WeightFormat, m: int, k: int, *, gate: bool, hopper: bool
) -> GemvPlan | StreamPlan:
    """The plan of a product; `hopper`: the code is for sm_90 alone.

    Blocks of a cluster share panels where else multiprocessors would have none, or where x would
    leave too little memory for weights.
    """
    if not hopper or (gate and m % (2 * PANEL)):
        return gemv_plan(k)
    tiles = ceildiv(m, PANEL) // (2 if gate else 1)
    plans = [
        StreamPlan(cluster=cluster, blocks=cluster * clusters, stages=stages)
        for cluster, clusters in CLUSTERS.items()
        for stages in range(2, 9)
    ]
    fitting = [p for p in plans if stream_bytes(fmt, m, k, p, gate=gate) <= STREAM_BYTES]
    if not fitting:
        return gemv_plan(k)

    def merit(plan: StreamPlan) -> tuple[int, int, int]:
        clusters = plan.blocks // plan.cluster
        rounds = ceildiv(tiles, clusters) / plan.cluster  # of panels a block
        return -round(100 * rounds * 132 / tiles), min(plan.stages, 5), -plan.cluster

    return max(fitting, key=merit)


def stream_bytes(fmt: WeightFormat, m: int, k: int, plan: StreamPlan, *, gate: bool) -> int:
    """Shared memory of a block, as stream.cuh divides it."""
    features, kinds = plan.chunks * chunk_features(fmt), 1
    stage = plan.chunks * PANEL * 16
    unit = CHUNKS
    if not fmt.is_float and fmt.group:
        kinds = 2 if fmt.has_min else 1
        size = 4 if fmt.scale_dtype == "float32" else 2
        stage += kinds * ceildiv(features, fmt.group) * PANEL * size
        unit = max(unit, fmt.group // chunk_features(fmt))
    tiles = ceildiv(m, PANEL) // (2 if gate else 1)
    tiles = ceildiv(ceildiv(tiles, plan.blocks // plan.cluster), plan.cluster) * plan.cluster
    panels = tiles * (2 if gate else 1)
    chunks = ceildiv(ceildiv(num_chunks(fmt, k), unit), plan.cluster) * unit
    run = CHUNKS * chunk_features(fmt)
    if 0 < fmt.group < run:  # scales of 16 features share a run of 32
        run = fmt.group
    x = _arranged_bytes(fmt, chunks * chunk_features(fmt), run)
    return _BARRIER_BYTES + 2 * 256 * 4 + plan.stages * stage + panels * PANEL * 4 + x


def shared_bytes(fmt: WeightFormat, k: int, plan: GemvPlan) -> int:
    """Shared memory of a block, as gemv.cuh divides it."""
    features = ceildiv(k, CHUNKS * chunk_features(fmt)) * CHUNKS * chunk_features(fmt)
    part = 1 if fmt.is_float else chunk_features(fmt) // groups_per_chunk(fmt)
    return 2 * plan.warps * TILE * 4 + _arranged_bytes(fmt, features, part)


def _arranged_bytes(fmt: WeightFormat, features: int, part: int) -> int:
    """Of x as it is multiplied: floats, or integers and, for each part, a scale and a sum."""
    return features * 4 if fmt.is_float else features * 2 + features // part * 8
