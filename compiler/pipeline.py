"""The phases of a compile, each a short list of passes; DESIGN order, one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm import relax

from llmc.compiler import weight_plan
from llmc.compiler.passes.canonicalize import canonicalize
from llmc.compiler.passes.check_packing import check_packing
from llmc.compiler.passes.dispatch import RULE, dispatch
from llmc.compiler.passes.drop_state_checks import drop_state_checks
from llmc.compiler.passes.fuse_around import fuse_around
from llmc.compiler.passes.fuse_epilogue import fuse_epilogue
from llmc.compiler.passes.fuse_gated_activation import fuse_gated_activation
from llmc.compiler.passes.fuse_narrow_output import fuse_narrow_output
from llmc.compiler.passes.fuse_norm import fuse_norm
from llmc.compiler.passes.fuse_projections import fuse_projections
from llmc.compiler.passes.fuse_rope import fuse_rope
from llmc.compiler.passes.fuse_rope_kv_write import fuse_rope_kv_write
from llmc.compiler.passes.lift_scratch import lift_scratch
from llmc.compiler.passes.lower_attention import Page, lower_attention
from llmc.compiler.passes.plan_memory import plan_memory
from llmc.compiler.passes.quantize import Chooser, quantize
from llmc.compiler.passes.quantize_activations import quantize_activations, round_activations
from llmc.compiler.passes.rewrite_gqa import rewrite_gqa
from llmc.compiler.passes.share_tensors import share_tensors
from llmc.compiler.passes.specialize import specialize
from llmc.compiler.passes.view_result import view_result
from llmc.compiler.rewriter import count_uses, relax_functions, with_params
from llmc.models.trace import Trace
from llmc.targets.base import Target

Phase = Callable[[tvm.IRModule], tvm.IRModule]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBounds:
    """Upper bounds of a step: memory planning reads them."""

    max_tokens: int
    max_sequences: int
    max_logits_rows: int


def from_trace(trace: Trace) -> tvm.IRModule:
    """The traced module with its weight plan: each argument is one tensor of the model."""
    [(name, func)] = list(relax_functions(trace.module))
    tokens, rows = func.params[0].ty.shape[1], func.params[2].ty.shape[0]
    letters = {tokens: tvm.tirx.Var("T", "int64"), rows: tvm.tirx.Var("L", "int64")}
    func = func.without_attr("tir_var_upper_bound").without_attr("tir_var_lower_bound")
    module = tvm.IRModule({name: func.bind_symbolic_vars(letters)})
    module, plan = _merge_ties(module, trace.parameters)
    return weight_plan.attach(module, plan)


def _merge_ties(
    module: tvm.IRModule, parameters: dict[str, str]
) -> tuple[tvm.IRModule, weight_plan.Weights]:
    """Arguments that are one tensor of the model become one; those that nothing reads go."""
    [(name, func)] = list(relax_functions(module))
    inputs, params = func.params[:3], func.params[3:]
    first: dict[str, relax.Var] = {}
    ties = {p: first.setdefault(parameters[p.name], p) for p in params}
    tied = {old: new for old, new in ties.items() if not old.same_as(new)}
    if tied:
        func = func.bind_params(tied)
    uses = count_uses(func)
    kept = [p for p in first.values() if p in uses]
    plan = {p.name: weight_plan.WeightSpec(sources=[parameters[p.name]]) for p in kept}
    return tvm.IRModule({name: with_params(func, [*inputs, *kept])}), plan


def graph_phases(
    target: Target, choose: Chooser, activations: str, kv_dtype: str, bounds: StepBounds
) -> list[tuple[str, Phase]]:
    """The named phases from the traced function to calls of PrimFuncs."""

    def page(kv_heads: int, head_dim: int, v_head_dim: int, page_size: int) -> Page:
        return Page(
            key=target.key_page(kv_heads, head_dim, kv_dtype),
            value=target.value_page(kv_heads, v_head_dim, kv_dtype),
        )

    def narrow_activations(mod: tvm.IRModule) -> tvm.IRModule:
        if activations == "int8":
            return quantize_activations(mod, target.activation_blocks)
        return round_activations(mod) if activations == "bfloat16" else mod

    def lower(mod: tvm.IRModule) -> tvm.IRModule:
        return lower_attention(
            mod,
            page_size=target.page_size,
            kv_dtype=kv_dtype,
            page_layout=page,
            # Where all products take rounded activations, attention's may as well.
            factors=None if activations == "float32" else "bfloat16",
        )

    def split(mod: tvm.IRModule) -> tvm.IRModule:
        return specialize(
            mod,
            max_tokens=sorted({1, min(target.few_tokens, bounds.max_tokens), bounds.max_tokens}),
            max_sequences=bounds.max_sequences,
            max_logits_rows=bounds.max_logits_rows,
        )

    phases: list[tuple[str, list[Phase]]] = [
        ("canonicalize", [canonicalize]),
        ("rewrite-gqa", [rewrite_gqa, check_packing]),
        ("quantize", [lambda mod: quantize(mod, choose)]),
        ("fuse-projections", [fuse_projections]),
        ("recover", [fuse_norm, fuse_rope, canonicalize, fuse_gated_activation]),
        ("paged-attention", [lower, canonicalize]),
        (
            "fuse",
            [
                fuse_rope_kv_write,
                fuse_epilogue,
                narrow_activations,
                relax.transform.EliminateCommonSubexpr(),
                lambda mod: fuse_narrow_output(mod, target.panel),
            ],
        ),
        ("specialize", [split, lambda mod: fuse_around(mod, target.fuses)]),
        ("dispatch", [lambda mod: dispatch(mod, target)]),
        ("fuse-rest", [view_result, _fuse_rest, lambda mod: _schedule(mod, target)]),
    ]
    return [(name, _chain(passes)) for name, passes in phases]


def _chain(passes: list[Phase]) -> Phase:
    def run(mod: tvm.IRModule) -> tvm.IRModule:
        for apply in passes:
            mod = apply(mod)
        return mod

    return run


def _fuse_rest(mod: tvm.IRModule) -> tvm.IRModule:
    """What no rule of ours took: TVM's legalization and operator fusion."""
    names = [name.name_hint for name, _ in relax_functions(mod)]
    passes = tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.ConvertToDataflow(),
            relax.transform.RewriteDataflowReshape(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(names),
        ]
    )
    return passes(mod)


def _schedule(mod: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Schedules the PrimFuncs that TVM made; the first rule of the target to take one decides."""
    out = mod.clone()
    for name, func in mod.functions_items():
        if not isinstance(func, tvm.tirx.PrimFunc) or (func.attrs and RULE in func.attrs):
            continue
        for rule, schedule in target.schedule_rules:
            scheduled = schedule(func)
            if scheduled is not None:
                out[name] = scheduled.with_attr(RULE, rule)
                break
        else:
            out[name] = func.with_attr(RULE, "unscheduled")
    return out


def with_sampling(
    mod: tvm.IRModule, target: Target, vocab_size: int, bounds: StepBounds
) -> tvm.IRModule:
    """`mod` and the functions that choose tokens on the target's devices, where it has such."""
    sampling = target.sampling(vocab_size)
    if sampling is None:
        return mod
    rows = {"L": bounds.max_logits_rows, "R": bounds.max_logits_rows}
    out = mod.clone()
    for variable, func in sampling.module.functions_items():
        if isinstance(func, relax.Function):
            func = func.with_attr("tir_var_upper_bound", rows)
        else:
            func = func.with_attr(RULE, sampling.rule)
        out[variable] = func
    return out


def lower_to_vm(mod: tvm.IRModule, *, results_at_bounds: bool = False) -> tvm.IRModule:
    """Static memory planning and the Relax VM's own lowering."""
    passes = tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
        ]
    )
    planned = plan_memory(lift_scratch(passes(mod)), results_at_bounds=results_at_bounds)
    return share_tensors(planned)


def lower_memory(mod: tvm.IRModule) -> tvm.IRModule:
    """From planned memory to VM instructions."""
    passes = tvm.transform.Sequential(
        [
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )
    return drop_state_checks(passes(mod))
