"""Norms and gated products hand their outputs on narrow, as the next product takes them.

    quantize_activations(rms_norm(x, w))
    ->   quantized_rms_norm(x, w)
    quantize_activations(gated_activation(integer_linear(codes, …, W)))
    ->   gated_integer_linear(codes, …, W)
    round_activations(rms_norm(x, w)), round_activations(gated_activation(bfloat16_linear(x, W)))
    ->   rounded_rms_norm(x, w), gated_bfloat16_linear(x, W)

Stands behind quantize_activations: what lies between does not reach memory in float32.
"""

from __future__ import annotations

import tvm

from llmc import dialect
from llmc.compiler.rewriter import Expr, Scope, apply_rule

_Fused = tuple[dialect.Operator, dict[str, Expr]]


def fuse_narrow_output(mod: tvm.IRModule, panel: int) -> tvm.IRModule:
    """Fuses wherever nothing else reads what lies between, and outputs are whole panels."""

    def rule(call: Expr, scope: Scope) -> Expr | None:
        found = dialect.match_any(call)
        if found is None or not isinstance(
            found.op, dialect.QuantizeActivations | dialect.RoundActivations
        ):
            return None
        x = found.operands["x"]
        inner = dialect.match_any(scope.value(x))
        if inner is None or not scope.used_once(x) or int(x.ty.shape[-1]) % panel:
            return None
        fused = _norm(inner, found.op)
        if fused is None:
            fused = _gate(inner, found.op, scope)
        if fused is None:
            return None
        out = list(call.ty.fields) if isinstance(call.ty, tvm.ir.TupleType) else call.ty
        names = (name.removesuffix("?") for name in fused[0].operands)
        return fused[0].emit(out, *(fused[1].get(name) for name in names))

    return apply_rule(mod, rule)


def _norm(norm: dialect.Match, after: dialect.Operator) -> _Fused | None:
    """rms_norm and what narrows it."""
    op = norm.op
    if not isinstance(op, dialect.RmsNorm) or len(norm.operands["x"].ty.shape) != 3:
        return None
    if isinstance(after, dialect.QuantizeActivations):
        fused: dialect.Operator = dialect.QuantizedRmsNorm(
            eps=op.eps,
            offset=op.offset,
            block=after.block,
            unit=after.unit,
            factor=after.factor,
        )
    else:
        fused = dialect.RoundedRmsNorm(eps=op.eps, offset=op.offset)
    return fused, norm.operands


def _gate(gate: dialect.Match, after: dialect.Operator, scope: Scope) -> _Fused | None:
    """A product, its gated activation and what narrows that."""
    if not isinstance(gate.op, dialect.GatedActivation):
        return None
    x = gate.operands["x"]
    product = dialect.match_any(scope.value(x))
    if product is None or not scope.used_once(x) or "residual" in product.operands:
        return None
    before, kind = product.op, gate.op.kind
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
