"""Products take narrow activations: bytes with quantized weights, bfloat16 with bfloat16 ones.

    y = linear(x, W, bias, residual)
    ->   codes, scales, sums = quantize_activations(x)
         y = integer_linear(codes, scales, sums, W, bias, residual)
    (likewise integer_grouped_linear for experts)
    or   y = bfloat16_linear(round_activations(x), W, bias, residual)

Stands after fuse_epilogue; the elimination of common subexpressions behind it lets products of one
x share its codes. The scheme says which of the two; for bytes, the target says which blocks of
features share a scale, or that it has no integer product for a format. Experts do not take
bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler.rewriter import Expr, Scope, apply_rule
from llmc.formats import FORMATS, WeightFormat
from llmc.targets.base import ActivationBlocks

# (weight format, input features) -> blocks, or None where the product stays in floats
Blocks = Callable[[WeightFormat, int], ActivationBlocks | None]


def quantize_activations(mod: tvm.IRModule, blocks: Blocks) -> tvm.IRModule:
    """Rewrites every product of `mod` that `blocks` has an answer for."""

    def rewrite(call: Expr, scope: Scope) -> Expr | None:
        found = dialect.Linear.match(call) or dialect.GroupedLinear.match(call)
        if found is None or found[0].format is None:
            return None
        operands, fmt = found[1], FORMATS[found[0].format]
        x, weight = operands["x"], operands["weight"]
        chosen = blocks(fmt, int(weight.ty.shape[-1]))
        if chosen is None:
            return None
        if len(x.ty.shape) == 2:  # experts' rows
            x = scope.emit(relax.op.reshape(x, relax.ShapeExpr([1, *x.ty.shape])))
        coded = dialect.QuantizeActivations(
            block=chosen.block, unit=chosen.unit, factor=chosen.factor
        )
        parts = scope.emit(coded.call(x))
        codes = [scope.emit(relax.TupleGetItem(parts, i)) for i in range(3)]
        if isinstance(found[0], dialect.GroupedLinear):
            experts = dialect.IntegerGroupedLinear(format=fmt.name, block=chosen.block)
            last = operands["expert_ids"]
            return experts.emit(call.ty, *codes, weight, operands.get("bias"), last)
        product = dialect.IntegerLinear(format=fmt.name, block=chosen.block)
        epilogue = operands.get("bias"), operands.get("residual")
        return product.emit(call.ty, *codes, weight, *epilogue)

    return apply_rule(mod, rewrite)


def round_activations(mod: tvm.IRModule) -> tvm.IRModule:
    """Rewrites every product of `mod` with bf16 weights and an even number of input features."""

    def rewrite(call: Expr, scope: Scope) -> Expr | None:
        found = dialect.Linear.match(call)
        if found is None or found[0].format != "bf16":
            return None
        operands = found[1]
        if int(operands["weight"].ty.shape[1]) % 2:
            return None
        rounded = scope.emit(dialect.RoundActivations().call(operands["x"]))
        return dialect.Bfloat16Linear().emit(
            call.ty, rounded, operands["weight"], operands.get("bias"), operands.get("residual")
        )

    return apply_rule(mod, rewrite)
