"""Residual additions move into what stands beside them.

    linear(x, W) + r                 -> linear(x, W, residual=r)
    s = a + b; n = rms_norm(s, w)    -> (s, n) = add_rms_norm(a, b, w)

The first wins: an addition inside a product's epilogue costs no pass over memory at all.
"""

from __future__ import annotations

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler.rewriter import (
    Expr,
    Scope,
    apply_rule,
    bindings,
    op_args,
    relax_functions,
    same_shape,
)


def fuse_epilogue(mod: tvm.IRModule) -> tvm.IRModule:
    """Fuses residual additions into products, then those that are left into norms."""
    mod = apply_rule(mod, _into_product)
    [(_, func)] = list(relax_functions(mod))
    # Which sums are normalized: known before the additions are rewritten.
    # A weight that is computed may not exist yet where the sum is.
    params = set(func.params)
    norms = {
        found[1]["x"]: found
        for found in (dialect.RmsNorm.match(b.value) for b in bindings(func))
        if found is not None and found[1]["weight"] in params
    }

    def into_norm(call: Expr, scope: Scope) -> Expr | None:
        added = _add(call, scope, norms)
        return _norm(call, scope) if added is None else added

    return apply_rule(mod, into_norm)


def _into_product(call: Expr, scope: Scope) -> Expr | None:
    args = op_args(call, "relax.add")
    if args is None or not same_shape(args[0], args[1]):
        return None
    for product, residual in ((args[0], args[1]), (args[1], args[0])):
        found = dialect.Linear.match(scope.value(product))
        if found is None or "residual" in found[1] or not scope.used_once(product):
            continue
        op, operands = found
        return op.call(operands["x"], operands["weight"], operands.get("bias"), residual)
    return None


def _add(
    call: Expr, scope: Scope, norms: dict[relax.Var, tuple[dialect.RmsNorm, dict[str, Expr]]]
) -> Expr | None:
    """a + b of a sum that is normalized later -> add_rms_norm(a, b, w)[0]."""
    args = op_args(call, "relax.add")
    found = norms.get(scope.target) if scope.target is not None else None
    if args is None or found is None or not same_shape(args[0], args[1]):
        return None
    if len(args[0].ty.shape) != 3:
        return None
    op, operands = found
    both = dialect.AddRmsNorm(eps=op.eps, offset=op.offset)
    pair = scope.emit(both.call(args[0], args[1], operands["weight"]))
    return relax.TupleGetItem(pair, 0)


def _norm(call: Expr, scope: Scope) -> Expr | None:
    """rms_norm(add_rms_norm(a, b, w)[0], w) -> add_rms_norm(a, b, w)[1]."""
    found = dialect.RmsNorm.match(call)
    if found is None:
        return None
    item = scope.value(found[1]["x"])
    if not isinstance(item, relax.TupleGetItem) or item.index != 0:
        return None
    pair = dialect.AddRmsNorm.match(scope.value(item.tuple_value))
    if pair is None or not pair[1]["weight"].same_as(found[1]["weight"]):
        return None
    if (pair[0].eps, pair[0].offset) != (found[0].eps, found[0].offset):
        return None
    return relax.TupleGetItem(item.tuple_value, 1)
