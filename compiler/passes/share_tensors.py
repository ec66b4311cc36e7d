"""One tensor for each place, shape and type of the planned memory, in place of one for each use.

    t = alloc_tensor(storage, shape, dtype)      both layers' outputs lie at the same place, so the
    u = alloc_tensor(storage, shape, dtype)      second one is u = t
    r = reshape(t, shape)                        is a tensor of the place as well
    a, b = (t, u)                                tuples that are only taken apart go

Stands behind memory planning and before `KillAfterLastUse`. The Relax VM calls a function for each
allocation, release, tuple and view of a step: several times as often as for kernels.
"""

from __future__ import annotations

import tvm
from tvm import relax

from llmc.compiler.rewriter import (
    Expr,
    bindings,
    count_uses,
    op_args,
    relax_functions,
    with_bindings,
)

_ALLOC = "relax.memory.alloc_tensor"


def share_tensors(mod: tvm.IRModule) -> tvm.IRModule:
    """Rewrites every Relax function of `mod`, whose bodies are plain sequences."""
    out = mod.clone()
    for name, func in relax_functions(mod):
        out[name] = _Sharing(func).run()
    return out


class _Sharing:
    """One function's rewriting, from its first binding to its last."""

    def __init__(self, func: relax.Function) -> None:
        self._func = func
        self._same: dict[relax.Var, Expr] = {}  # what stands for a variable that went
        self._tuples: dict[relax.Var, relax.Tuple] = {}
        self._calls: dict[relax.Var, relax.Call] = {}  # that allocated a tensor
        self._tensors: dict[str, relax.Var] = {}
        self._storages: dict[relax.Var, int] = {}

    def run(self) -> relax.Function:
        func = self._func
        kept = [b for binding in bindings(func) for b in self._rewritten(binding)]
        result = self._replaced(func.body.body)
        uses = count_uses(with_bindings(func, kept, result))
        kept = [b for b in kept if b.var not in self._tuples or b.var in uses]
        return with_bindings(func, kept, result)

    def _rewritten(self, binding: relax.Binding) -> list[relax.VarBinding]:
        """What is left of a binding: one, or nothing."""
        assert isinstance(binding, relax.VarBinding), binding
        var, value = binding.var, self._replaced(binding.value)
        if isinstance(value, relax.Tuple):
            self._tuples[var] = value
        elif isinstance(value, relax.Var):
            self._same[var] = value
            return []
        value = self._view(value)
        if op_args(value, _ALLOC) is not None:
            tensor = self._tensors.setdefault(self._place(value), var)
            if tensor is not var:
                self._same[var] = tensor
                return []
            self._calls[var] = value
        return [relax.VarBinding(var, value)]

    def _view(self, value: Expr) -> Expr:
        """The allocation that a reshaped tensor of planned memory amounts to."""
        args = op_args(value, "relax.reshape")
        if args is None or args[0] not in self._calls:
            return value
        alloc = self._calls[args[0]]
        storage, offset, _, *rest = alloc.args
        call = relax.Call(alloc.op, [storage, offset, args[1], *rest], alloc.attrs, alloc.ty_args)
        return relax.BlockBuilder().normalize(call)

    def _place(self, alloc: relax.Call) -> str:
        """Equal where two allocations in planned memory are one tensor."""
        storage, offset, shape, dtype, *rest = alloc.args
        number = self._storages.setdefault(storage, len(self._storages))
        return f"{number} {offset} {shape} {dtype} {rest}"

    def _replaced(self, expr: Expr) -> Expr:
        """`expr` with what stands for its variables."""
        if isinstance(expr, relax.Var):
            return self._same.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._replaced(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            whole = self._replaced(expr.tuple_value)
            if whole in self._tuples:
                return self._tuples[whole].fields[expr.index]
            return relax.TupleGetItem(whole, expr.index)
        if isinstance(expr, relax.Call):
            args = [self._replaced(arg) for arg in expr.args]
            if any(not new.same_as(old) for new, old in zip(args, expr.args, strict=True)):
                return relax.Call(expr.op, args, expr.attrs, expr.ty_args)
        return expr
