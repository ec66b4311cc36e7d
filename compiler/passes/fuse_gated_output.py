"""A narrow product hands its gated output to the next one narrow.

    quantize_activations(gated_activation(integer_linear(codes, …, W)))
    ->   gated_integer_linear(codes, …, W)
    round_activations(gated_activation(bfloat16_linear(x, W)))
    ->   gated_bfloat16_linear(x, W)

Stands behind quantize_activations: neither the two halves nor what they make reach memory in
float32.
"""

from __future__ import annotations

import tvm

from llmc import dialect
from llmc.compiler.rewriter import Expr, Scope, apply_rule


def fuse_gated_output(mod: tvm.IRModule, panel: int) -> tvm.IRModule:
    """Fuses wherever nothing else reads what lies between, and both halves of the weight's rows are
    whole panels.
    """

    def rule(call: Expr, scope: Scope) -> Expr | None:
        fused = _fused(call, scope)
        if fused is None or int(fused[1]["weight"].ty.shape[0]) % (2 * panel):
            return None
        names = (name.removesuffix("?") for name in fused[0].operands)
        out = list(call.ty.fields) if isinstance(call.ty, tvm.ir.TupleType) else call.ty
        return fused[0].emit(out, *(fused[1].get(name) for name in names))

    return apply_rule(mod, rule)


def _fused(call: Expr, scope: Scope) -> tuple[dialect.Operator, dict[str, Expr]] | None:
    """The operator that `call` becomes, and its operands."""
    found = dialect.match_any(call)
    if found is None or not isinstance(
        found.op, dialect.QuantizeActivations | dialect.RoundActivations
    ):
        return None
    gate = dialect.GatedActivation.match(_only(found.operands["x"], scope))
    product = dialect.match_any(None if gate is None else _only(gate[1]["x"], scope))
    if gate is None or product is None or "residual" in product.operands:
        return None
    before, after, kind = product.op, found.op, gate[0].kind
    if isinstance(before, dialect.IntegerLinear) and isinstance(after, dialect.QuantizeActivations):
        fused = dialect.GatedIntegerLinear(
            format=before.format,
            block=before.block,
            kind=kind,
            out_block=after.block,
            out_unit=after.unit,
            out_factor=after.factor,
        )
        return fused, product.operands
    if isinstance(before, dialect.Bfloat16Linear) and isinstance(after, dialect.RoundActivations):
        return dialect.GatedBfloat16Linear(kind=kind), product.operands
    return None


def _only(x: Expr, scope: Scope) -> Expr | None:
    """What `x` is bound to, if it is read nowhere else."""
    return scope.value(x) if scope.used_once(x) else None
