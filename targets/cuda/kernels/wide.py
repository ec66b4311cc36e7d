"""Products of many tokens on Hopper: RMSNorm before and a gated activation behind them where asked.

See wide.cuh. One launch normalizes the activations, rounds them (to bfloat16 for bf16 weights, else
to float16) and puts them into the order that the next one multiplies; which kernel that is, and how
many blocks share a tile, is decided by the number of tokens.
"""

from __future__ import annotations

from typing import Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, kernel
from llmc.targets.cuda.kernels.gemv import GATES
from llmc.targets.cuda.kernels.source import NAMES, source
from llmc.targets.cuda.kernels.tensor_cores import cuda_format, start
from llmc.targets.cuda.parameters import WIDE_CLUSTERS, TensorCorePlan, WideTokens
from llmc.targets.gpu.kernels.block import launch, quotient_up, rows_of, workspace
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import PANEL, ceildiv, chunk_features, num_chunks, stored_groups

Expr = Any

_ARRANGED = 2  # tokens of a block that orders them
_FEW = 64  # tokens that would leave most of the device without such blocks
_BARRIER_BYTES = 128


def takes(fmt: WeightFormat, m: int, *, gate: bool) -> bool:
    """Whether there is such a product: float32 weights would be rounded, and halves are panels.

    Not of nested scales, which no device has compared with float64 yet, and not of float8 codes,
    which spill registers.
    """
    plain = fmt.bits <= 16 and fmt.sub_scales is None and not fmt.float_codes
    return plain and (not gate or m % (2 * PANEL) == 0)


def linear_wide(
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
    plan: TensorCorePlan[WideTokens],
) -> PrimFunc:
    """y `[1, T, M]` (with `gate` `[1, T, M / 2]`) = weight · x `[1, T, K]`.

    Buffers in order: x, the norm's weight `[K]` where `norm` gives its epsilon and offset, the
    packed arrays, bias `[M]` and residual where asked, y. Raises CompileError where the format
    cannot hold k features.
    """
    outputs = m // 2 if gate else m
    with kernel("linear_wide") as built:
        tokens = rows_of(None)
        x = argument("x", (1, tokens, k), dtype)
        norms = argument("norm", (k,), norm_dtype) if norm else None
        weights = Weights.arguments(fmt, m, k)
        biases = argument("bias", (m,), vector_dtype) if bias else None
        residuals = argument("residual", (1, tokens, outputs), dtype) if residual else None
        y = argument("y", (1, tokens, outputs), dtype)
        steps = [*plan.steps, (None, plan.last)]
        longest = max(_features(fmt, k, step) for _, step in steps)
        most = max(step.tokens for _, step in steps)
        arranged = workspace((quotient_up(tokens, most) * i64(most * longest),), "float16")
        parts: list[Any] = [*weights.buffers, y, y][:3]
        optional = [y if b is None else b for b in (biases, residuals)]
        flags = ", ".join(str(b is not None).lower() for b in (biases, residuals))
        types = f"{NAMES[dtype]}, {NAMES[vector_dtype]}"
        groups = 0 if fmt.is_float else stored_groups(fmt, k)

        def multiply(step: WideTokens, limit: int | None) -> None:
            features = _features(fmt, k, step)
            tiles = quotient_up(tokens, step.tokens)
            name = f"{cuda_format(fmt)}, {str(norm is not None).lower()}, {step.tokens}"
            pairs = tiles * i64(step.tokens // _ARRANGED)
            few = limit is not None and limit <= _FEW and norm is None
            shares = ceildiv(features, 128 * chunk_features(fmt)) if few else 1
            with launch((pairs, i64(shares)), (128 * _ARRANGED,)) as (block, share, _):
                T.evaluate(
                    cuda_func_call(
                        f"llmc::arrange_wide<{name}, {NAMES[dtype]}, {NAMES[norm_dtype]}>",
                        *(start(b) for b in (x, x if norms is None else norms, arranged)),
                        *(_int(n) for n in (k, tokens, features)),
                        *(T.float32(number) for number in norm or (0.0, 0.0)),
                        *(_int(n) for n in (block, share, shares)),
                        source_code=_source(),
                    )
                )
            stages = ceildiv(weights.chunks, step.chunks)
            cluster = cluster_of(step, m, stages, limit)
            all_tiles = tiles * i64(ceildiv(m, step.rows))
            blocks = all_tiles * i64(cluster) if cluster > 1 else T.min(all_tiles, i64(step.blocks))
            numbers = (step.tokens, step.chunks, step.stages, GATES[gate] if gate else 0)
            shape = f"llmc::Wide<{cuda_format(fmt)}, {', '.join(map(str, numbers))}>"
            with launch((blocks,), (step.threads,), cluster=cluster) as (block, _):
                memory = T.alloc_buffer([i64(shared_bytes(fmt, step))], "uint8", scope="shared.dyn")
                T.evaluate(
                    cuda_func_call(
                        f"llmc::multiply_wide<{cuda_format(fmt)}, {flags}, {types}, {shape}>",
                        *(start(buffer) for buffer in (*parts, arranged, *optional, y)),
                        *(_int(n) for n in (m, outputs, k, weights.chunks, groups, tokens)),
                        _int(block),
                        _int(blocks),
                        start(memory),
                        source_code=_source(),
                    )
                )

        def choose(number: int) -> None:
            limit, step = steps[number]
            assert isinstance(step, WideTokens), step
            if limit is None:
                multiply(step, None)
                return
            with T.If(tokens <= i64(limit)):
                with T.Then():
                    multiply(step, limit)
                with T.Else():
                    choose(number + 1)

        choose(0)
    return built.func


def cluster_of(step: WideTokens, m: int, stages: int, limit: int | None) -> int:
    """Blocks that share a tile of at most `limit` tokens, of as many stages: all begin at once."""
    if limit is None:
        return 1
    tiles = ceildiv(m, step.rows) * ceildiv(limit, step.tokens)
    sizes = (n for n, most in WIDE_CLUSTERS.items() if tiles <= most and n <= stages)
    return max(sizes, default=1)


def shared_bytes(fmt: WeightFormat, step: WideTokens) -> int:
    """Shared memory of a block, as wide.cuh divides it."""
    features = step.chunks * chunk_features(fmt)
    bytes_ = step.chunks * step.rows * 16 + features * step.tokens * 2
    if not fmt.is_float and fmt.group:
        size = 4 if fmt.scale_dtype == "float32" else 2
        bytes_ += max(1, features // fmt.group) * step.rows * size * (2 if fmt.has_min else 1)
    return _BARRIER_BYTES + step.stages * bytes_


def _features(fmt: WeightFormat, k: int, step: WideTokens) -> int:
    """k filled up to whole stages."""
    return ceildiv(num_chunks(fmt, k), step.chunks) * step.chunks * chunk_features(fmt)


def _source() -> str:
    return source("tensor_cores") + source("gemv") + source("wide")


def _int(value: int | Expr) -> Expr:
    return T.int32(value) if isinstance(value, int) else T.Cast("int32", value)
