"""Attention of several new tokens of a sequence on tensor cores, over pages of 16-bit floats.

Queries and weights are rounded to the pages' type; scores, softmax and sums are float32. What it
computes is said in targets/gpu/kernels/attention.py, how in attention.cuh.
"""

from __future__ import annotations

from typing import Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cuda.kernels.source import NAMES, source
from llmc.targets.cuda.parameters import FLASH_PLANS, FlashPlan
from llmc.targets.gpu.kernels.attention_inputs import Inputs, Shape
from llmc.targets.gpu.kernels.block import launch, quotient
from llmc.targets.gpu.layout import ceildiv

Expr = Any

_FLOATS = {"float16": "half", "uint16": "__nv_bfloat16"}
_MATRIX = 8  # positions that ldmatrix takes from a chunk
_FRAGMENT = 16  # features, rows, positions of an mma


def flash_plan(
    head_dim: int, v_head_dim: int, page_size: int, kv_dtype: str, shared_bytes: int
) -> FlashPlan | None:
    """How blocks with so much shared memory are used; None where tensor cores do not fit."""
    if kv_dtype not in _FLOATS or any(n % _FRAGMENT for n in (head_dim, v_head_dim)):
        return None
    if page_size % _MATRIX:
        return None
    for keys, values, plan in FLASH_PLANS:
        blocks = (plan.positions, plan.group_positions)
        if head_dim > keys or v_head_dim > values or any(n % page_size for n in blocks):
            continue
        if flash_bytes(head_dim, v_head_dim, page_size, plan) <= shared_bytes:
            return plan
    return None


def flash_bytes(head_dim: int, v_head_dim: int, page_size: int, plan: FlashPlan) -> int:
    """Shared memory of a block, where it takes most; attention.cuh divides it."""
    chunks, queries = (head_dim + v_head_dim) // 8, head_dim // 8 * (plan.rows + 1) * 16
    walks = ((plan.positions, plan.stages, plan.stages), (plan.group_positions, 2, 3))
    return queries + max(
        ceildiv(tables * (positions // page_size) * 4, 16) * 16
        + stages * chunks * (positions + 1) * 16
        for positions, stages, tables in walks
    )


def flash(shape: Shape, inputs: Inputs, plan: FlashPlan) -> None:
    """Emits the launch for all sequences with more than one new token."""
    # Every sequence may end in a tile that is not full.
    tiles = quotient(inputs.rows * i64(shape.heads), plan.rows) + inputs.sequences
    blocks = tiles * i64(shape.num_kv_heads)
    with launch((blocks,), (plan.threads,)) as (block, _):
        bytes_ = flash_bytes(shape.head_dim, shape.v_head_dim, shape.page_size, plan)
        memory = T.alloc_buffer([i64(bytes_)], "uint8", scope="shared.dyn")
        # Those with the longest context first, of all heads.
        tile = tiles - i64(1) - T.floordiv(block, i64(shape.num_kv_heads))
        sinks = inputs.out if inputs.sinks is None else inputs.sinks
        batch = (inputs.q, inputs.q_starts, inputs.kv_lens, inputs.tables)
        buffers = (*batch, inputs.k_pages, inputs.v_pages, sinks, inputs.out)
        numbers = (inputs.sequences, inputs.tables.ty.shape[2], tile)
        head = T.floormod(block, i64(shape.num_kv_heads))
        T.evaluate(
            cuda_func_call(
                _name(shape, inputs, plan),
                *(buffer.data for buffer in buffers),
                T.float32(shape.scale),
                T.float32(shape.softcap or 0.0),
                T.int32(shape.window or 0),
                T.int32(shape.group),
                *(T.Cast("int32", number) for number in (*numbers, head)),
                memory.data,
                source_code=source("attention"),
            )
        )


def _name(shape: Shape, inputs: Inputs, plan: FlashPlan) -> str:
    """The device function with its template's arguments."""
    heads = (shape.head_dim, shape.v_head_dim, shape.heads, shape.num_kv_heads, shape.page_size)
    tiles = (plan.warps, plan.positions, plan.stages, plan.group_positions)
    numbers = ", ".join(str(n) for n in (*heads, *tiles))
    kind = f"llmc::Attention<{_FLOATS[shape.kv.dtype]}, {numbers}>"
    data = NAMES[str(inputs.out.ty.dtype)]
    sink = "float" if inputs.sinks is None else NAMES[str(inputs.sinks.ty.dtype)]
    return f"llmc::attend<{kind}, {str(inputs.sinks is not None).lower()}, {data}, {sink}>"
