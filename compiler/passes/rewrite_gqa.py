"""Grouped-query attention: keys and values repeated for each query head are not materialized.

    attention(q, repeat(k), repeat(v)) -> attention(q, k, v)     H / Kv query heads share a key head
    nn.attention(q, k, v, causal)      -> llmc.attention(...)    plain torch programs, ONNX

`repeat` is what models write as expand_dims + broadcast_to + reshape, or as repeat along the head
axis.
Source: Ainslie et al., GQA, 2023.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler.rewriter import Expr, Scope, apply_rule, op_args, same_extent, static_shape

_HEADS_FIRST = [0, 2, 1, 3]


def rewrite_gqa(mod: tvm.IRModule) -> tvm.IRModule:
    """Turns causal `nn.attention` into `llmc.attention`; removes repeated heads before either."""
    layers = itertools.count()

    def recover(call: Expr, scope: Scope) -> Expr | None:
        return _recover(call, scope, layers)

    return apply_rule(apply_rule(mod, recover), _rewrite)


def _recover(call: Expr, scope: Scope, layers: Iterator[int]) -> Expr | None:
    """relax.nn.attention on `[1, T, H, D]` with a causal mask; bias or window: left alone."""
    args = op_args(call, "relax.nn.attention")
    if args is None or call.attrs.causal_mask != "TopLeft" or call.attrs.window_size is not None:
        return None
    query, key, _ = args
    if static_shape(query)[0] != 1 or not same_extent(query, key, 1):
        return None
    head_dim = static_shape(query)[3]
    scale = call.attrs.scale
    if scale is None and head_dim is None:
        return None
    value = float(scale) if scale is not None else float(head_dim or 0) ** -0.5
    op = dialect.Attention(layer=next(layers), scale=value)
    return op.call(*(_heads_first(x, scope) for x in args))


def _heads_first(x: Expr, scope: Scope) -> Expr:
    """`[1, T, H, D]` -> `[1, H, T, D]`, or what was transposed to give x."""
    value = scope.value(x)
    inner = op_args(value, "relax.permute_dims")
    if inner is not None and [int(a) for a in value.attrs.axes or ()] == _HEADS_FIRST:
        return inner[0]
    return scope.emit(relax.op.permute_dims(x, _HEADS_FIRST))


def _rewrite(call: Expr, scope: Scope) -> Expr | None:
    found = dialect.Attention.match(call)
    if found is None:
        return None
    op, operands = found
    key, value = (_unrepeated(operands[name], scope) for name in ("key", "value"))
    if key is None or value is None or key[1] != value[1]:
        return None
    return op.call(operands["query"], key[0], value[0], operands.get("sinks"))


def _unrepeated(expr: Expr, scope: Scope) -> tuple[Expr, int] | None:
    """(x, n) if expr `[1, Kv·n, T, D]` holds each head of x `[1, Kv, T, D]` n times in a row."""
    value = scope.value(expr)
    args = op_args(value, "relax.repeat")
    if args is not None and value.attrs.axis is not None and int(value.attrs.axis) == 1:
        return args[0], int(value.attrs.repeats)
    reshaped = op_args(value, "relax.reshape")
    spread = op_args(scope.value(reshaped[0]), "relax.broadcast_to") if reshaped else None
    expanded = scope.value(spread[0]) if spread else None
    inner = op_args(expanded, "relax.expand_dims") if expanded is not None else None
    if inner is None or expanded is None or [int(a) for a in expanded.attrs.axis] != [2]:
        return None
    x = inner[0]
    before, after = static_shape(x), static_shape(expr)
    wide = static_shape(scope.value(reshaped[0])) if reshaped else []
    if len(before) != 4 or len(after) != 4 or before[1] is None or wide[2] is None:
        return None
    heads = after[1] == before[1] * wide[2]
    whole = heads and same_extent(x, expr, 2) and same_extent(x, expr, 3)
    return (x, wide[2]) if whole else None
