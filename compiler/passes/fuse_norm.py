"""Recover RMS normalization from the chain of small operators that models write.

    y = x · rsqrt(mean(x · x, -1) + eps) · w          -> llmc.rms_norm(x, w), offset 0
    y = x · rsqrt(mean(x · x, -1) + eps) · (w + 1)    -> llmc.rms_norm(x, w), offset 1

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019. Needs canonicalize (x² as a
product).
"""

from __future__ import annotations

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler.rewriter import Expr, Scope, apply_rule, op_args, scalar, static_shape


def fuse_norm(mod: tvm.IRModule) -> tvm.IRModule:
    """Rewrites every RMS normalization of `mod`."""
    return apply_rule(mod, _rewrite)


def _rewrite(call: Expr, scope: Scope) -> Expr | None:
    args = op_args(call, "relax.multiply")
    if args is None:
        return None
    for normalized, weight in (args, reversed(args)):
        found = _normalized(normalized, scope)
        if found is None:
            continue
        x, eps = found
        plain, offset = _weight(weight, scope)
        # Kernels take rows `[1, T, E]` or heads `[1, T, H, D]`, and a factor for each feature.
        if len(x.ty.shape) in (3, 4) and static_shape(plain) == [static_shape(x)[-1]]:
            return _emit(dialect.RmsNorm(eps=eps, offset=offset), x, plain, scope)
    return None


def _emit(op: dialect.RmsNorm, x: Expr, weight: Expr, scope: Scope) -> relax.Call:
    """The call; a transposition of x's leading axes moves behind it, where attention undoes it."""
    permuted = scope.value(x)
    args = op_args(permuted, "relax.permute_dims")
    if args is not None and permuted.attrs.axes is not None:
        axes = [int(a) for a in permuted.attrs.axes]
        if axes[-1] == len(axes) - 1:
            return relax.op.permute_dims(scope.emit(op.call(args[0], weight)), axes)
    return op.call(x, weight)


def _normalized(expr: Expr, scope: Scope) -> tuple[Expr, float] | None:
    """(x, eps) if expr is x · rsqrt(mean(x · x) + eps)."""
    product = op_args(scope.value(expr), "relax.multiply")
    if product is None:
        return None
    for x, factor in (product, reversed(product)):
        inner = op_args(scope.value(factor), "relax.rsqrt")
        shifted = op_args(scope.value(inner[0]), "relax.add") if inner else None
        if shifted is None:
            continue
        for mean, eps in (shifted, reversed(shifted)):
            value = scalar(eps)
            if value is not None and _is_mean_square(mean, x, scope):
                return x, value
    return None


def _is_mean_square(expr: Expr, x: Expr, scope: Scope) -> bool:
    """Whether expr is mean(x · x) over the last axis, kept as a dimension."""
    mean = scope.value(expr)
    args = op_args(mean, "relax.mean")
    if args is None or not mean.attrs.keepdims or mean.attrs.axis is None:
        return False
    rank = len(x.ty.shape)
    if [int(a) % rank for a in mean.attrs.axis] != [rank - 1]:
        return False
    square = op_args(scope.value(args[0]), "relax.multiply")
    return square is not None and square[0].same_as(x) and square[1].same_as(x)


def _weight(expr: Expr, scope: Scope) -> tuple[relax.Expr, float]:
    """(w, 1) if expr is w + 1, else (expr, 0)."""
    shifted = op_args(scope.value(expr), "relax.add")
    if shifted is not None:
        for weight, one in (shifted, reversed(shifted)):
            if scalar(one) == 1.0:
                return weight, 1.0
    return expr, 0.0
