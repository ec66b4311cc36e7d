"""Chooses a weight format for every product: the scheme's rules, as data, applied to the function.

A format is an attribute of `llmc.linear`, `llmc.embedding` and `llmc.grouped_linear` and an entry
of the weight plan; no number changes here. Transposed weights become `[M, K]` arguments (the plan
transposes when it runs). A router's small product stays float32: its choice is discrete.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler import weight_plan
from llmc.compiler.rewriter import (
    Expr,
    Scope,
    apply_rule,
    bindings,
    count_uses,
    op_args,
    relax_functions,
    variables,
    with_params,
)
from llmc.compiler.weight_plan import WeightSpec
from llmc.errors import UnsupportedError

# (sources, input features, is an embedding or the output projection) -> format name
Chooser = Callable[[list[str], int, bool], str]
_PRODUCTS = (dialect.Linear, dialect.Embedding, dialect.GroupedLinear)


def quantize(mod: tvm.IRModule, choose: Chooser) -> tvm.IRModule:
    """Gives every product of `mod` its format; `choose` is a scheme's rule."""
    [(name, func)] = list(relax_functions(mod))
    weights = weight_plan.weights_of(mod)
    routers, heads = _routers(func), _vocabulary_weights(func)
    arguments: dict[relax.Var, relax.Var] = {}
    for param, transposed in _weight_params(func).items():
        spec = weights[param.name]
        shape = list(param.ty.shape)
        if transposed:
            shape[-2:] = [shape[-1], shape[-2]]
        chosen = "f32" if param in routers else choose(spec.sources, int(shape[-1]), param in heads)
        weights[param.name] = WeightSpec(sources=spec.sources, format=chosen, transposed=transposed)
        arguments[param] = relax.Var(param.name, relax.TensorType(shape, param.ty.dtype))

    def rewrite(call: Expr, scope: Scope) -> Expr | None:
        found = dialect.match_any(call)
        if found is None or not isinstance(found.op, _PRODUCTS):
            return None
        weight = found.operands["weight"]
        if weight not in arguments:
            return None
        chosen = weights[weight.name].format
        given = {**found.operands, "weight": arguments[weight]}
        op = type(found.op)(format=chosen)
        names = [n.removesuffix("?") for n in op.operands]
        return op.emit(found.out[0], *(given.get(n) for n in names))

    wide = mod.clone()
    wide[name] = with_params(func, [*func.params, *arguments.values()])
    rewritten = apply_rule(wide, rewrite)
    rewritten[name] = with_params(rewritten[name], [arguments.get(p, p) for p in func.params])
    return weight_plan.attach(rewritten, weights)


def _weight_params(func: relax.Function) -> dict[relax.Var, bool]:
    """Parameters that are the weight of a product -> whether it is stored transposed.

    Raises UnsupportedError where one is read in another way too: it exists in packed form only.
    """
    params, uses = set(func.params), count_uses(func)
    found: dict[relax.Var, list[bool]] = {}
    for binding in bindings(func):
        match = dialect.match_any(binding.value)
        if match is None or not isinstance(match.op, _PRODUCTS):
            continue
        weight = match.operands["weight"]
        if weight in params:
            found.setdefault(weight, []).append(getattr(match.op, "transposed", False))
    for weight, transposed in found.items():
        if len(transposed) != uses[weight] or len(set(transposed)) > 1:
            raise UnsupportedError(
                f"weight {weight.name} is read by products and in {uses[weight] - len(transposed)} "
                f"other ways, {sum(transposed)} of {len(transposed)} products transposed",
                hint="a weight is packed once, for products of one orientation",
            )
    return {weight: transposed[0] for weight, transposed in found.items()}


def _vocabulary_weights(func: relax.Function) -> set[relax.Var]:
    """Weights of embeddings, and of the products that make logits: those on `[1, L, K]`."""
    rows = func.params[2].ty.shape[0]
    found = set()
    for binding in bindings(func):
        match = dialect.match_any(binding.value)
        if match is None:
            continue
        logits = isinstance(match.op, dialect.Linear) and match.operands["x"].ty.shape[1].same_as(
            rows
        )
        if logits or isinstance(match.op, dialect.Embedding):
            found.add(match.operands["weight"])
    return found


def _routers(func: relax.Function) -> set[relax.Var]:
    """Weights of the products whose result decides on experts: those that topk sees."""
    definitions = {b.var: b.value for b in bindings(func)}
    found: set[relax.Var] = set()
    pending = [v for v in definitions.values() if _chooses(v)]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        match = dialect.match_any(value)
        if match is not None and isinstance(match.op, dialect.Linear):
            found.add(match.operands["weight"])
            continue
        if match is not None and not isinstance(match.op, dialect.TopK):
            continue  # what a router reads is not a router
        pending += [definitions[v] for v in variables(value) if v in definitions]
    return found


def _chooses(value: Expr) -> bool:
    return op_args(value, "relax.topk") is not None or dialect.TopK.match(value) is not None
