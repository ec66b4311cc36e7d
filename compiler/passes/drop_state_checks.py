"""What does not change from step to step is not checked in every step.

The Relax VM's lowering begins each function by comparing every argument with its annotation: type,
rank, extents. Of a step's inputs that stays. Caches and weights are the runtime's, made as the
manifest says, and every kernel compares the tensors it is given with its own declaration: two calls
for each of several hundred tensors go.

Stands behind `VMShapeLower`. A comparison that also binds a symbolic extent stays.
"""

from __future__ import annotations

import tvm
from tvm import relax

from llmc.compiler.rewriter import Expr, bindings, relax_functions, with_bindings

_CHECKS = ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")
_BINDS = 1  # the code of match_shape that stores an extent (MatchShapeCode::kStoreToHeap)


def drop_state_checks(mod: tvm.IRModule) -> tvm.IRModule:
    """Drops the checks of all arguments behind `host`, the last input of an entry point."""
    out = mod.clone()
    for name, func in relax_functions(mod):
        state = _state(func)
        kept = [b for b in bindings(func) if not _is_check(b.value, state)]
        out[name] = with_bindings(func, kept)
    return out


def _state(func: relax.Function) -> set[relax.Var]:
    """Caches and weights; nothing of a function that is no entry point."""
    params = list(func.params)
    hosts = [i for i, p in enumerate(params) if isinstance(p.ty, relax.ShapeType)]
    return set(params[hosts[-1] + 1 :]) if hosts else set()


def _is_check(value: Expr, state: set[relax.Var]) -> bool:
    """Whether a call only compares one of `state` with its annotation."""
    if not isinstance(value, relax.Call) or not isinstance(value.op, relax.ExternFunc):
        return False
    if value.op.global_symbol not in _CHECKS or value.args[0] not in state:
        return False
    if value.op.global_symbol == _CHECKS[0]:
        return True
    # tensor, heap, rank, then a code and its operand for each extent, and what an error says
    return _BINDS not in [int(code) for code in value.args[3:-1:2]]
