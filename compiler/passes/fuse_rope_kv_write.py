"""Rotation and page writing of a fused q/k/v projection become one operator.

    q, k, v = slices of qkv; kv_write(rope(k), v); attention(rope(q))   ->   q = rope_kv_write(qkv)

Needs fuse_projections (or a model that projects q, k, v at once), fuse_rope and lower_attention.
Attention whose keys are normalized first, or not rotated, keeps the separate operators.
"""

from __future__ import annotations

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.canonicalize import slice_bounds
from llmc.compiler.rewriter import Expr, Scope, apply_rule, op_args, static_shape


def fuse_rope_kv_write(mod: tvm.IRModule) -> tvm.IRModule:
    """Fuses every layer of `mod` that has the form above."""
    return apply_rule(mod, _rewrite)


def _rewrite(call: Expr, scope: Scope) -> Expr | None:
    found = dialect.PagedAttention.match(call)
    if found is None:
        return None
    attention, operands = found
    query = dialect.Rope.match(scope.value(operands["query"]))
    written = scope.value(operands["k_pages"])
    if query is None or not isinstance(written, relax.TupleGetItem):
        return None
    write = dialect.KvWrite.match(scope.value(written.tuple_value))
    key = dialect.Rope.match(scope.value(write[1]["key"])) if write else None
    if write is None or key is None or key[0] != query[0]:
        return None
    if not (key[1]["cos"].same_as(query[1]["cos"]) and key[1]["sin"].same_as(query[1]["sin"])):
        return None
    qkv = _common_source(scope, query[1]["x"], key[1]["x"], write[1]["value"])
    if qkv is None:
        return None
    heads, head_dim = (static_shape(query[1]["x"])[i] for i in (2, 3))
    kv_heads = static_shape(key[1]["x"])[2]
    op = dialect.RopeKvWrite(
        group=write[0].group,
        num_heads=heads or 0,
        num_kv_heads=kv_heads or 0,
        head_dim=head_dim or 0,
        v_head_dim=attention.v_head_dim,
        rotary_dim=key[0].rotary_dim,
    )
    pages = [write[1][n] for n in ("slots", "k_pages", "v_pages")]
    fused = scope.emit(op.call(qkv, key[1]["cos"], key[1]["sin"], *pages))
    rotated, k_pages, v_pages = (scope.emit(relax.TupleGetItem(fused, i)) for i in range(3))
    return attention.call(
        rotated,
        operands["q_starts"],
        operands["kv_lens"],
        operands["block_tables"],
        k_pages,
        v_pages,
        operands.get("sinks"),
    )


def _common_source(scope: Scope, query: Expr, key: Expr, value: Expr) -> Expr | None:
    """The tensor `[1, T, ·]` whose features are query, key and value, in this order, or None."""
    source, end = None, 0
    for part in (query, key, value):
        reshaped = op_args(scope.value(part), "relax.reshape")
        found = slice_bounds(scope.value(reshaped[0])) if reshaped else None
        if found is None or found[1] != 2 or found[2] != end:
            return None
        if source is not None and not found[0].same_as(source):
            return None
        source, end = found[0], found[3]
    return source if source is not None and static_shape(source)[2] == end else None
