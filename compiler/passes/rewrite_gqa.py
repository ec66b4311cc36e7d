"""Grouped-query attention: keys and values repeated for each query head are not materialized.

    attention(q, repeat(k), repeat(v)) -> attention(q, k, v)     H / Kv query heads share a key head
    nn.attention(q, k, v, causal)      -> llmc.attention(...)    plain torch programs, ONNX

`repeat` is what models write as expand_dims + broadcast_to + reshape, or as repeat along the head
axis.
Source: Ainslie et al., GQA, 2023.
"""

from __future__ import annotations

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler.rewriter import Expr, Scope, apply_rule, op_args, static_shape


def rewrite_gqa(mod: tvm.IRModule) -> tvm.IRModule:
    """Turns causal `nn.attention` into `llmc.attention`; removes repeated heads before either."""
    layers = iter(range(1 << 30))

    def recover(call: Expr, scope: Scope) -> Expr | None:
        return _recover(call, scope, layers)

    return apply_rule(apply_rule(mod, recover), _rewrite)


def _recover(call: Expr, scope: Scope, layers: object) -> Expr | None:
    """relax.nn.attention on `[1, T, H, D]` with a causal mask; attention with a bias is left."""
    args = op_args(call, "relax.nn.attention")
    if args is None or call.attrs.causal_mask != "TopLeft":
        return None
    heads_first = [scope.emit(relax.op.permute_dims(x, [0, 2, 1, 3])) for x in args[:3]]
    head_dim = static_shape(args[0])[3]
    scale = call.attrs.scale
    if scale is None:
        if head_dim is None:
            return None
        value = head_dim**-0.5
    else:
        value = float(scale)
    op = dialect.Attention(layer=next(layers), scale=value)  # type: ignore[call-overload]
    return op.call(*heads_first)


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
    return (x, wide[2]) if after[1] == before[1] * wide[2] and before[3] == after[3] else None
