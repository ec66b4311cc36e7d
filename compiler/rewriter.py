"""How passes rewrite Relax functions: a rule per call, from the first binding to the last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from llmc.errors import LlmcError

Expr: TypeAlias = relax.Expr


class Scope:
    """What a rule may look up and do while a function is rewritten."""

    def __init__(self, owner: Any, uses: dict[relax.Var, int]) -> None:  # noqa: ANN401
        self._owner = owner
        self._uses = uses
        self.target: relax.Var | None = None  # the variable, as it was, that is being bound

    def value(self, expr: Expr) -> Expr:
        """The expression bound to `expr` if it is a variable of this function, else `expr`."""
        while isinstance(expr, relax.Var):
            bound = self._owner.lookup_binding(expr)
            if bound is None:
                return expr
            expr = bound
        return expr

    def emit(self, expr: Expr) -> relax.Var:
        """Binds `expr` to a new variable and returns it."""
        return self._owner.builder_.emit(expr)

    def used_once(self, var: Expr) -> bool:
        """Whether the function that is rewritten reads `var` exactly once.

        Variables that the rewriting itself created are counted as read more than once.
        """
        return self._uses.get(var, 2) == 1


Rule = Callable[[Expr, Scope], Expr | None]


@mutator
class _RuleMutator(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: tvm.IRModule, rule: Rule, uses: dict[relax.Var, int]) -> None:
        super().__init__(mod)
        self.rule = rule
        self.scope = Scope(self, uses)
        self.error: LlmcError | None = None

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        self.scope.target = binding.var
        super().visit_var_binding_(binding)

    def visit_call_(self, call: relax.Call) -> Expr:
        return self._rewritten(self.visit_expr_post_order(call))

    def visit_tuple_getitem_(self, item: relax.TupleGetItem) -> Expr:
        return self._rewritten(self.visit_expr_post_order(item))

    def _rewritten(self, expr: Expr) -> Expr:
        try:
            replaced = self.rule(expr, self.scope)
        except LlmcError as exc:
            # The visitor calls back through C++, which knows no Python exception classes.
            self.error = exc
            raise
        return expr if replaced is None else replaced


def apply_rule(mod: tvm.IRModule, rule: Rule) -> tvm.IRModule:
    """Rewrites every Relax function of `mod` and removes what became dead.

    `rule(call, scope)` sees each call and tuple access with its operands already rewritten; it
    returns the replacement, or None to leave it.
    """
    out = mod.clone()
    for name, func in relax_functions(mod):
        visitor = _RuleMutator(mod, rule, count_uses(func))
        try:
            out[name] = visitor.visit_expr(func)
        except RuntimeError as exc:
            if visitor.error is not None:
                raise visitor.error from exc
            raise
    out = relax.transform.CanonicalizeBindings()(relax.transform.Normalize()(out))
    return relax.transform.DeadCodeElimination([n.name_hint for n, _ in relax_functions(out)])(out)


def relax_functions(mod: tvm.IRModule) -> Iterator[tuple[tvm.ir.GlobalVar, relax.Function]]:
    """The Relax functions of `mod`, with their global variables."""
    return iter([(g, f) for g, f in mod.functions_items() if isinstance(f, relax.Function)])


def with_params(func: relax.Function, params: list[relax.Var]) -> relax.Function:
    """`func` with other parameters; its body is left alone."""
    return relax.Function(params, func.body, func.ret_ty, func.is_pure, func.attrs)


def with_bindings(
    func: relax.Function, kept: Sequence[relax.Binding], result: Expr | None = None
) -> relax.Function:
    """`func` with other bindings in one block, and another result where one is given."""
    body = relax.SeqExpr([relax.BindingBlock(kept)], func.body.body if result is None else result)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)


def bindings(func: relax.Function) -> Iterator[relax.VarBinding]:
    """All variable bindings of `func`, in order."""
    for block in func.body.blocks:
        yield from block.bindings


def variables(expr: Expr) -> list[relax.Var]:
    """The variables that `expr` reads, each as often as it does, and its types' extents."""
    found: list[relax.Var] = []

    def visit(part: Expr) -> None:
        if isinstance(part, relax.Var):
            found.append(part)

    relax.analysis.post_order_visit(expr, visit)
    return found


def origins(expr: Expr, made_of: Mapping[relax.Var, set[relax.Var]]) -> set[relax.Var]:
    """What `expr` may read a part of, where `made_of` says so of variables."""
    return {origin for var in variables(expr) for origin in made_of.get(var, ())}


def count_uses(func: relax.Function) -> dict[relax.Var, int]:
    """How often each variable is read; what the function returns counts as read."""
    uses: Counter[relax.Var] = Counter()
    for binding in bindings(func):
        uses.update(variables(binding.value))
    uses.update(variables(func.body.body))
    return dict(uses)


def op_args(expr: Expr, name: str) -> list[Expr] | None:
    """The arguments of `expr` if it calls the Relax operator `name`, else None."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == name:
        return list(expr.args)
    return None


def scalar(expr: Expr) -> float | None:
    """The value of a scalar constant, else None."""
    if not isinstance(expr, tvm.ir.GenericConst):
        return None
    array = expr.value.numpy()
    return float(array.item()) if array.size == 1 else None


def static_shape(expr: Expr) -> list[int | None]:
    """The extents of a tensor, None where symbolic."""
    return [int(d) if isinstance(d, tvm.tirx.IntImm) else None for d in expr.ty.shape]


def same_shape(a: Expr, b: Expr) -> bool:
    """Whether two tensors provably have one shape."""
    rank = len(a.ty.shape)
    return rank == len(b.ty.shape) and all(same_extent(a, b, axis) for axis in range(rank))


def same_extent(a: Expr, b: Expr, axis: int) -> bool:
    """Whether two tensors are provably equally long along `axis`."""
    return bool(tvm_ffi.structural_equal(a.ty.shape[axis], b.ty.shape[axis]))
