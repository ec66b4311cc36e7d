"""A product takes in the norm before it and the gated activation behind it.

    linear(rms_norm(x, w), W)         -> fused_linear(x, w, W)
    gated_activation(linear(x, W))    -> fused_linear(x, W), gate

Where the target has such products for an entry point: to normalize a row again, or on the way to
where it is multiplied, costs less than a launch and a pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.dispatch import MAX_TOKENS
from llmc.compiler.rewriter import Expr, Scope, apply_rule, relax_functions
from llmc.formats import FORMATS, WeightFormat

Takes = Callable[[WeightFormat, int, int, int], bool]


def fuse_around(mod: tvm.IRModule, takes: Takes) -> tvm.IRModule:
    """Fuses into the products whose format, `[M, K]` and number of tokens the target `takes`."""
    out = mod.clone()
    for name, func in relax_functions(mod):
        max_tokens = int(func.attrs[MAX_TOKENS])
        single = tvm.IRModule({name: func})
        for rule in (_norm, _gate):
            single = apply_rule(single, _checked(rule, takes, max_tokens))
        [(_, out[name])] = list(relax_functions(single))
    return out


def _checked(
    rule: Callable[[Expr, Scope], relax.Call | None], takes: Takes, max_tokens: int
) -> Callable[[Expr, Scope], Expr | None]:
    def fuse(call: Expr, scope: Scope) -> Expr | None:
        made = rule(call, scope)
        if made is None:
            return None
        found = dialect.FusedLinear.match(made)
        assert found is not None, "the rules return fused products"
        m, k = (int(e) for e in found[1]["weight"].ty.shape)
        return made if takes(FORMATS[found[0].format or "f32"], m, k, max_tokens) else None

    return fuse


def _norm(call: Expr, scope: Scope) -> relax.Call | None:
    found = dialect.Linear.match(call)
    if found is None or found[0].transposed:
        return None
    product, operands = found
    norm = dialect.RmsNorm.match(scope.value(operands["x"]))
    if norm is None or not scope.used_once(operands["x"]) or len(norm[1]["x"].ty.shape) != 3:
        return None
    op = dialect.FusedLinear(eps=norm[0].eps, offset=norm[0].offset, format=product.format)
    weight, bias, residual = (operands.get(n) for n in ("weight", "bias", "residual"))
    return op.call(norm[1]["x"], norm[1]["weight"], weight, bias, residual)


def _gate(call: Expr, scope: Scope) -> relax.Call | None:
    found = dialect.GatedActivation.match(call)
    if found is None or not scope.used_once(found[1]["x"]):
        return None
    product = dialect.match_any(scope.value(found[1]["x"]))
    if product is None or not isinstance(product.op, dialect.Linear | dialect.FusedLinear):
        return None
    before, operands = product.op, product.operands
    if "residual" in operands or getattr(before, "transposed", False):
        return None
    if isinstance(before, dialect.Linear):
        before = dialect.FusedLinear(format=before.format)
    op = replace(before, gate=found[0].kind)
    return op.call(
        operands["x"], operands.get("norm"), operands["weight"], operands.get("bias"), None
    )
