"""Paged attention for GPUs: one function for prefill chunks, decodes and any mixture of them.

The packed rows are cut by what they are. A sequence with one new token is a decode: a block for
each sequence and K/V head (attention_decode.py). Longer ones are cut into tiles of tokens, a block
for each tile and K/V head (attention_tile.py). Both launches stand in one function; a block that
finds nothing to do ends at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.errors import UnsupportedError
from llmc.targets.building import argument, i64, kernel, size_var
from llmc.targets.gpu.kernels.attention_decode import decode as decodes
from llmc.targets.gpu.kernels.attention_inputs import Inputs, Shape
from llmc.targets.gpu.kernels.attention_plans import DecodePlan, TilePlan
from llmc.targets.gpu.kernels.attention_tile import prefill as tiles
from llmc.targets.gpu.kernels.block import rows_of
from llmc.targets.gpu.kernels.kv_pages import kv_type
from llmc.targets.gpu.parameters import GpuParameters

Expr = Any
Emit = Callable[[Shape, Inputs], None]


def paged_attention(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    page_size: int,
    kv_dtype: str,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    group: int,
    num_groups: int,
    tokens: int | None,
    dtype: str,
    sink_dtype: str,
    params: GpuParameters,
    prefill: Emit | None = None,
    decode: Emit | None = None,
) -> PrimFunc:
    """Attention of new tokens over their sequences' pages, causal.

    Buffers in order: q `[1, T, H, D]`, q_starts `[S+1]` i32, kv_lens `[S]` i32, block_tables
    `[G, S, B]` i32, k_pages and v_pages `[P, Kv, elements]` (kv_dtype, see kv_pages.py), sinks
    `[H]` (only with `sinks`), out `[1, T, H, Dv]`; q and out are of `dtype`. docs/shapes.md
    explains the ragged batch; rows from `q_starts[S]` on are not written. `prefill` emits a
    target's launches for sequences with several new tokens, if not the one of attention_tile.py,
    `decode` those for single ones, if not those of attention_decode.py.

    A position i sees j with i - window < j <= i; pages wholly outside are not read, nor are their
    table entries. `softcap` replaces a score s by softcap · tanh(s / softcap). A sink is one more
    logit of its head, whose probability is dropped.

    Raises UnsupportedError where the heads do not divide or the KV type is unknown.
    """
    if num_heads % num_kv_heads:
        raise UnsupportedError(
            f"attention with {num_heads} query heads over {num_kv_heads} K/V heads: "
            "the first must be a multiple of the second"
        )
    shape = Shape(
        num_kv_heads=num_kv_heads,
        heads=num_heads // num_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        page_size=page_size,
        kv=kv_type(kv_dtype),
        scale=scale,
        window=window,
        softcap=softcap,
        group=group,
    )
    with kernel("paged_attention") as built:
        rows = rows_of(tokens)
        sequences, blocks, pages = (size_var(n) for n in ("sequences", "blocks", "pages"))
        inputs = Inputs(
            rows=rows,
            sequences=sequences,
            q=argument("q", (1, rows, num_heads, head_dim), dtype),
            q_starts=argument("q_starts", (sequences + i64(1),), "int32"),
            kv_lens=argument("kv_lens", (sequences,), "int32"),
            tables=argument("block_tables", (num_groups, sequences, blocks), "int32"),
            k_pages=argument("k_pages", (pages, num_kv_heads, shape.keys.elements), kv_dtype),
            v_pages=argument("v_pages", (pages, num_kv_heads, shape.values.elements), kv_dtype),
            sinks=argument("sinks", (num_heads,), sink_dtype) if sinks else None,
            out=argument("out", (1, rows, num_heads, v_head_dim), dtype),
        )
        if decode is not None:
            decode(shape, inputs)
        else:
            decodes(shape, inputs, DecodePlan.of(shape, params.attention, params.features))
        if tokens != 1 and prefill is not None:
            prefill(shape, inputs)
        elif tokens != 1:
            tiles(shape, inputs, TilePlan.of(shape, params.attention, params.features))
    return built.func
