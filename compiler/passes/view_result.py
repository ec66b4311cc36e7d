"""A result that is another tensor in another shape is a view of it.

    return reshape(x, shape)        -> return vm.builtin.reshape(x, shape)

TVM makes views of reshaped tensors inside a function only; a step's result would be a copy of all
logits. Stands before the operators become kernels.
"""

from __future__ import annotations

import tvm
from tvm import relax

from llmc.compiler.rewriter import Expr, Scope, apply_rule, op_args, relax_functions


def view_result(mod: tvm.IRModule) -> tvm.IRModule:
    """Rewrites what the Relax functions of `mod` return."""
    results = {func.body.body for _, func in relax_functions(mod)}

    def rule(call: Expr, scope: Scope) -> Expr | None:
        args = op_args(call, "relax.reshape")
        if args is None or scope.target not in results:
            return None
        return relax.op.call_pure_packed("vm.builtin.reshape", *args, ty_args=call.ty)

    return apply_rule(mod, rule)
