"""act(gate) · up over the two halves of one projection -> llmc.gated_activation.

Stands after fuse_projections, which makes gate and up halves of one tensor `[…, 2I]`.
"""

from __future__ import annotations

import tvm

from llmc import dialect
from llmc.compiler.passes.canonicalize import slice_bounds
from llmc.compiler.rewriter import Expr, Scope, apply_rule, op_args, static_shape

_KINDS = {
    "relax.nn.silu": "silu",
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.relu": "relu",
}


def fuse_gated_activation(mod: tvm.IRModule) -> tvm.IRModule:
    """Rewrites every gated activation of `mod` whose gate stands before its up half."""
    return apply_rule(mod, _rewrite)


def _rewrite(call: Expr, scope: Scope) -> Expr | None:
    args = op_args(call, "relax.multiply")
    if args is None:
        return None
    for activated, up in (args, reversed(args)):
        value = scope.value(activated)
        for name, kind in _KINDS.items():
            inner = op_args(value, name)
            x = _halves(inner[0], up, scope) if inner else None
            if x is not None and len(x.ty.shape) == 3:
                return dialect.GatedActivation(kind=kind).call(x)
    return None


def _halves(gate: Expr, up: Expr, scope: Scope) -> Expr | None:
    """x if gate is the first and up the second half of x's last axis."""
    first, second = slice_bounds(scope.value(gate)), slice_bounds(scope.value(up))
    if first is None or second is None or not first[0].same_as(second[0]):
        return None
    x = first[0]
    last, width = len(x.ty.shape) - 1, static_shape(x)[-1]
    if width is None or width % 2:
        return None
    whole = first[1:] == (last, 0, width // 2) and second[1:] == (last, width // 2, width)
    return x if whole else None
