"""Dispatch: every dialect operator becomes a call of a kernel that a rule of the target returned.

Stands last of the graph passes. Rules are tried in order and the first kernel wins; an operator
that no rule takes is an UnsupportedError. Weights become the packed arrays that the kernels read:
one argument each, entered into the weight plan. Every function has the attribute "llmc.max_tokens",
the largest T it serves.
"""

from __future__ import annotations

import json
from dataclasses import replace

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler import weight_plan
from llmc.compiler.passes.lower_attention import STEP_INPUTS
from llmc.compiler.rewriter import (
    Expr,
    Scope,
    apply_rule,
    bindings,
    origins,
    relax_functions,
    with_params,
)
from llmc.errors import UnsupportedError
from llmc.formats import FORMATS
from llmc.targets.base import Kernel, Site, Target

RULE = "llmc.rule"  # attribute of a PrimFunc: the rule that chose it
MAX_TOKENS = "llmc.max_tokens"


def dispatch(mod: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Replaces every dialect operator of `mod`; packed arguments take their weights' places."""
    packed, weights = _packed_params(mod, target)
    out = mod.clone()
    kernels = _Kernels(target)
    for name, func in relax_functions(mod):
        single = tvm.IRModule({name: _widened(func, packed)})
        chosen = _dispatch_function(single, func, target, packed, kernels)
        narrow = with_params(chosen, _narrowed(func, packed))
        out[name] = relax.utils.copy_with_new_vars(narrow)
    for kernel_name, kernel in kernels.functions.items():
        out[kernels.variables[kernel_name]] = kernel
    return weight_plan.attach(out, weights)


class _Kernels:
    """The PrimFuncs chosen so far, one for each distinct call site."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.functions: dict[str, tvm.tirx.PrimFunc] = {}
        self.variables: dict[str, tvm.ir.GlobalVar] = {}
        self._chosen: dict[str, tuple[Kernel, str]] = {}

    def choose(self, site: Site) -> tuple[Kernel, tvm.ir.GlobalVar]:
        """The kernel for `site` and its global variable."""
        key = _site_key(site)
        if key not in self._chosen:
            kernel = self._first_match(site)
            name = f"{kernel.rule.partition('.')[2]}_{len(self._chosen)}"
            func = _with_root_block(kernel.func).with_attr("global_symbol", name)
            self.functions[name] = func.with_attr(RULE, kernel.rule).with_attr("op_pattern", 8)
            variable = tvm.ir.GlobalVar(name)
            relax.expr._update_type(variable, func.ty)
            self.variables[name] = variable
            self._chosen[key] = kernel, name
        kernel, name = self._chosen[key]
        return kernel, self.variables[name]

    def _first_match(self, site: Site) -> Kernel:
        for rule, choose in self.target.kernel_rules:
            kernel = choose(site)
            if kernel is not None:
                return replace(kernel, rule=rule)
        shapes = {n: [str(e) for e in ty.shape] for n, ty in site.types.items()}
        raise UnsupportedError(
            f"target {self.target.name} has no kernel for operator {site.op.name} on {shapes}"
        )


def _with_root_block(func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """The kernel in the form that Relax's passes expect, its body one block without iterators.

    Kernels made of launches and loops alone come without.
    """
    if isinstance(func.body, tvm.s_tir.SBlockRealize):
        return func
    block = tvm.s_tir.SBlock([], [], [], "root", func.body)
    return func.with_body(tvm.s_tir.SBlockRealize([], True, block))


def _site_key(site: Site) -> str:
    """Equal for sites that get the same kernel."""
    types = {n: f"{[str(e) for e in t.shape]}{t.dtype}" for n, t in site.types.items()}
    return f"{site.op!r}|{json.dumps(types)}|{site.max_tokens}|{site.tokens}|{site.residual_ends}"


def _dispatch_function(
    single: tvm.IRModule,
    func: relax.Function,
    target: Target,
    packed: dict[str, list[relax.Var]],
    kernels: _Kernels,
) -> relax.Function:
    tables = func.params[STEP_INPUTS.index("block_tables")].ty.shape
    extent = func.params[0].ty.shape[0]
    tokens = int(extent) if isinstance(extent, tvm.tirx.IntImm) else None
    max_tokens = int(func.attrs[MAX_TOKENS])
    ending = _ending_residuals(func)

    def rewrite(call: Expr, scope: Scope) -> Expr | None:
        found = dialect.match_any(call)
        if found is None:
            return None
        operands = dict(found.operands)
        site = Site(
            op=found.op,
            types={n: v.ty for n, v in operands.items()},
            max_tokens=max_tokens,
            tokens=tokens,
            num_groups=int(tables[0]),
            page_size=target.page_size,
            residual_ends=scope.target in ending,
        )
        kernel, variable = kernels.choose(site)
        return _call(kernel, variable, operands, packed, found.out)

    rewritten = apply_rule(single, rewrite)
    [(_, function)] = list(relax_functions(rewritten))
    return function


def _ending_residuals(func: relax.Function) -> set[relax.Var]:
    """The results of operators whose residual nothing else reads, then or later.

    Such a residual is what an operator made and only operators read: others may be fused, and read
    it where the last of them stood.
    """
    # The parameters and results that a variable may be a part of; extents are variables as well.
    made_of = {param: {param} for param in func.params}
    last: dict[relax.Var, int] = {}
    kept = set(func.params)

    calls = []
    for number, binding in enumerate(bindings(func)):
        read = origins(binding.value, made_of)
        last.update(dict.fromkeys(read, number))
        found = dialect.match_any(binding.value)
        if found is not None:
            made_of[binding.var] = {binding.var}
            if "residual" in found.operands:
                calls.append((number, binding.var, found.operands))
            continue
        made_of[binding.var] = read
        if not isinstance(binding.value, relax.TupleGetItem):
            kept |= read
    kept |= origins(func.body.body, made_of)

    ending = set()
    for number, var, operands in calls:
        others = {o for n, v in operands.items() if n != "residual" for o in origins(v, made_of)}
        residual = origins(operands["residual"], made_of)
        if residual.isdisjoint(kept | others) and all(last[o] == number for o in residual):
            ending.add(var)
    return ending


def _call(
    kernel: Kernel,
    variable: tvm.ir.GlobalVar,
    operands: dict[str, Expr],
    packed: dict[str, list[relax.Var]],
    out: list[relax.TensorType],
) -> relax.Call:
    arguments: list[Expr] = []
    positions: dict[str, int] = {}
    for name in kernel.operands:
        positions[name] = len(arguments)
        value = operands[name]
        if name == "weight" and isinstance(value, relax.Var) and value.name in packed:
            arguments += packed[value.name]
        else:
            arguments.append(value)
    if all(name is None for name in kernel.in_place):
        return relax.op.call_tir(variable, arguments, out_ty=out if len(out) > 1 else out[0])
    indices = [-1 if name is None else positions[name] for name in kernel.in_place]
    return relax.op.call_tir_inplace(variable, arguments, indices, out)


def _packed_params(
    mod: tvm.IRModule, target: Target
) -> tuple[dict[str, list[relax.Var]], weight_plan.Weights]:
    """The packed arguments of each product's weight, and the plan with them in its place."""
    weights = weight_plan.weights_of(mod)
    packed: dict[str, list[relax.Var]] = {}
    for name in _packed_names(mod):
        spec = weights.pop(name)
        [shape] = {
            tuple(int(e) for e in p.ty.shape)
            for _, f in relax_functions(mod)
            for p in f.params
            if p.name == name
        }
        parts = target.packed_parts(FORMATS[spec.format], shape)
        packed[name] = []
        for index, part in enumerate(parts):
            array = f"{name}.{part.suffix}"
            weights[array] = replace(spec, layout=target.layout, part=index)
            packed[name].append(relax.Var(array, relax.TensorType(part.shape, part.dtype)))
    return packed, weights


def _packed_names(mod: tvm.IRModule) -> list[str]:
    """Names of the parameters that are the weight of a product, in the order of their use."""
    names: dict[str, None] = {}
    for _, func in relax_functions(mod):
        params = set(func.params)
        for binding in bindings(func):
            found = dialect.match_any(binding.value)
            if found is None or not hasattr(found.op, "format"):
                continue
            weight = found.operands["weight"]
            if weight in params:
                names[weight.name] = None
    return list(names)


def _widened(func: relax.Function, packed: dict[str, list[relax.Var]]) -> relax.Function:
    added = [v for p in func.params if p.name in packed for v in packed[p.name]]
    return with_params(func, [*func.params, *added])


def _narrowed(func: relax.Function, packed: dict[str, list[relax.Var]]) -> list[relax.Var]:
    return [v for p in func.params for v in packed.get(p.name, [p])]
