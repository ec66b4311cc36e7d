"""Sibling projections of equal format become one product: q, k, v, and gate, up.

    a = linear(x, Wa); b = linear(x, Wb)
    ->   ab = linear(x, [Wa; Wb]); a = ab[…, :Ma]; b = ab[…, Ma:]

Stands after quantize: siblings of different formats stay apart. The plan concatenates rows (and
biases).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler import weight_plan
from llmc.compiler.passes.canonicalize import slice_axis
from llmc.compiler.rewriter import (
    Expr,
    Scope,
    apply_rule,
    bindings,
    count_uses,
    relax_functions,
    with_params,
)
from llmc.compiler.weight_plan import WeightSpec


@dataclass(slots=True)
class _Family:
    """Products that become one; offsets are in output features."""

    weights: list[relax.Var]
    biases: list[relax.Var]
    weight: relax.Var
    bias: relax.Var | None
    format: str
    product: relax.Var | None = None  # the fused product, once emitted


def fuse_projections(mod: tvm.IRModule) -> tvm.IRModule:
    """Fuses every family of sibling products of `mod`."""
    [(name, func)] = list(relax_functions(mod))
    weights = weight_plan.weights_of(mod)
    families = [_family(members, weights) for members in _siblings(func, weights)]
    by_weight = {w: family for family in families for w in family.weights}
    if not families:
        return mod

    def rewrite(call: Expr, scope: Scope) -> Expr | None:
        found = dialect.Linear.match(call)
        family = by_weight.get(found[1]["weight"]) if found else None
        if found is None or family is None:
            return None
        if family.product is None:
            op = dialect.Linear(format=family.format)
            product = op.call(found[1]["x"], family.weight, family.bias)
            family.product = scope.emit(product)
        index = [w.same_as(found[1]["weight"]) for w in family.weights].index(True)
        begin = sum(int(w.ty.shape[0]) for w in family.weights[:index])
        width = int(family.weights[index].ty.shape[0])
        return slice_axis(family.product, len(call.ty.shape) - 1, begin, begin + width)

    gone = {v for f in families for v in (*f.weights, *f.biases)}
    added = [v for f in families for v in (f.weight, f.bias) if v is not None]
    params = [*(p for p in func.params if p not in gone), *added]
    wide = mod.clone()
    wide[name] = with_params(func, [*func.params, *added])
    rewritten = apply_rule(wide, rewrite)
    rewritten[name] = with_params(rewritten[name], params)
    for var in gone:
        del weights[var.name]
    return weight_plan.attach(rewritten, weights)


def _siblings(
    func: relax.Function, weights: weight_plan.Weights
) -> list[list[tuple[relax.Var, relax.Var | None]]]:
    """(weight, bias) of the products that share input, format and having a bias; two or more."""
    uses, params = count_uses(func), set(func.params)
    groups: dict[tuple[object, ...], list[tuple[relax.Var, relax.Var | None]]] = defaultdict(list)
    for binding in bindings(func):
        found = dialect.Linear.match(binding.value)
        if found is None:
            continue
        op, operands = found
        weight, bias = operands["weight"], operands.get("bias")
        # A matrix read twice (a tied embedding) keeps its own argument.
        if weight not in params or uses[weight] != 1 or "residual" in operands:
            continue
        if bias is not None and (bias not in params or uses[bias] != 1):
            continue
        transposed = weights[weight.name].transposed  # how the model stores it
        groups[operands["x"], op.format, transposed, bias is None].append((weight, bias))
    return [members for members in groups.values() if len(members) > 1]


def _family(
    members: list[tuple[relax.Var, relax.Var | None]], weights: weight_plan.Weights
) -> _Family:
    """The fused arguments of one group, entered into the plan."""
    matrices = [w for w, _ in members]
    biases = [b for _, b in members if b is not None]
    first = weights[matrices[0].name]
    rows = sum(int(w.ty.shape[0]) for w in matrices)

    def fused(parts: list[relax.Var], shape: list[int]) -> relax.Var:
        name = "__".join(p.name for p in parts)
        specs = [weights[p.name] for p in parts]
        weights[name] = WeightSpec(
            sources=[s for spec in specs for s in spec.sources],
            format=specs[0].format,
            transposed=specs[0].transposed,
        )
        return relax.Var(name, relax.TensorType(shape, parts[0].ty.dtype))

    weight = fused(matrices, [rows, int(matrices[0].ty.shape[1])])
    bias = fused(biases, [rows]) if biases else None
    return _Family(matrices, biases, weight, bias, first.format)
