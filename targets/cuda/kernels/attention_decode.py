"""Attention of single new tokens on tensor cores: the launches of attention_decode.cuh."""

from __future__ import annotations

from typing import Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cuda.kernels.source import NAMES, source
from llmc.targets.cuda.kernels.tensor_cores import start
from llmc.targets.cuda.parameters import DecodePlan
from llmc.targets.gpu.kernels.attention_inputs import LOG2E, Inputs, Shape
from llmc.targets.gpu.kernels.block import launch, workspace

Expr = Any

_FLOATS = {"float16": "half", "uint16": "__nv_bfloat16"}
_MOST_FEATURES = 128  # of a head: queries and sums have to stay in registers


def takes(heads: int, head_dim: int, v_head_dim: int, page_size: int, kv_dtype: str) -> bool:
    """Whether the kernels below serve such heads, of which `heads` share a K/V head."""
    return (
        kv_dtype in _FLOATS
        and page_size == 16
        and head_dim % 32 == 0
        and v_head_dim % 64 == 0
        and max(head_dim, v_head_dim) <= _MOST_FEATURES
        and heads % min(heads, 8) == 0
    )


def decode(shape: Shape, inputs: Inputs, plan: DecodePlan) -> None:
    """Emits the launches for all sequences with one new token."""
    tile = min(shape.heads, 8)
    tiles = shape.num_kv_heads * shape.heads // tile
    heads = shape.num_kv_heads * shape.heads
    # As many parts as fill the device; the kernel uses fewer where a context is short.
    parts = T.Bind(
        T.max(
            T.min(T.truncdiv(i64(plan.blocks), inputs.sequences * i64(tiles)), i64(plan.parts)),
            i64(1),
        )
    )
    partial = workspace((inputs.sequences, heads, parts, shape.v_head_dim + 2))
    sinks = inputs.out if inputs.sinks is None else inputs.sinks
    numbers = (
        f"{_FLOATS[shape.kv.dtype]}, {shape.head_dim}, {shape.v_head_dim}, "
        f"{shape.heads}, {shape.num_kv_heads}"
    )
    types = (
        str(inputs.sinks is not None).lower(),
        NAMES[str(inputs.out.ty.dtype)],
        "float" if inputs.sinks is None else NAMES[str(inputs.sinks.ty.dtype)],
    )
    template = f"<llmc::Heads<{numbers}>, {plan.warps}, {', '.join(types)}>"
    window = T.int32(shape.window or 0)
    softcap = shape.softcap or 0.0
    with launch((inputs.sequences, tiles, parts), (32 * plan.warps,)) as (sequence, block, part, _):
        memory = T.alloc_buffer(
            [i64(4 * plan.warps * tile * (shape.v_head_dim + 2))], "uint8", scope="shared.dyn"
        )
        buffers = [inputs.q, inputs.q_starts, inputs.kv_lens, inputs.tables]
        buffers += [inputs.k_pages, inputs.v_pages, sinks, inputs.out, partial]
        integers = (inputs.sequences, inputs.tables.ty.shape[2], sequence, block, part, parts)
        T.evaluate(
            cuda_func_call(
                f"llmc::attend_one{template}",
                *(start(buffer) for buffer in buffers),
                T.float32(shape.query_scale),
                T.float32(softcap * LOG2E),
                T.float32(2 * LOG2E / softcap if softcap else 0.0),
                window,
                T.int32(shape.group),
                *(T.Cast("int32", n) for n in integers),
                start(memory),
                source_code=source("attention_decode"),
            )
        )
    with launch((inputs.sequences, heads), (shape.v_head_dim,)) as (sequence, head, _):
        buffers = [inputs.q_starts, inputs.kv_lens, sinks, inputs.out, partial]
        T.evaluate(
            cuda_func_call(
                f"llmc::merge_parts{template}",
                *(start(buffer) for buffer in buffers),
                window,
                *(T.Cast("int32", n) for n in (sequence, head, parts)),
                source_code=source("attention_decode"),
            )
        )
