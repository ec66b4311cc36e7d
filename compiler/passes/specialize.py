"""One function for each range of T: entry points of one signature that the runtime chooses from.

    step   ->   step_1 (T = L = 1, static), step_8 (T ≤ 8), step (T ≤ the compile parameter)

A branch inside one function would keep memory planning from seeing either side's shapes.
"""

from __future__ import annotations

import tvm
from tvm import relax

from llmc.compiler.passes.dispatch import MAX_TOKENS
from llmc.compiler.passes.lower_attention import STEP_INPUTS
from llmc.compiler.rewriter import relax_functions


def entry_name(max_tokens: int, is_last: bool) -> str:
    """`step`, or `step_N` for the smaller ones."""
    return "step" if is_last else f"step_{max_tokens}"


def specialize(
    mod: tvm.IRModule, *, max_tokens: list[int], max_sequences: int, max_logits_rows: int
) -> tvm.IRModule:
    """A copy of the function for each of `max_tokens` (ascending), its bounds as attributes."""
    [(_, func)] = list(relax_functions(mod))
    tokens = func.params[STEP_INPUTS.index("input_ids")].ty.shape[0]
    rows = func.params[STEP_INPUTS.index("logits_rows")].ty.shape[0]
    sequences = func.params[STEP_INPUTS.index("kv_lens")].ty.shape[0]
    out: dict[str, relax.Function] = {}
    for bound in max_tokens:
        last = bound == max_tokens[-1]
        made = func.bind_symbolic_vars({tokens: 1, rows: 1}) if bound == 1 else func
        made = relax.utils.copy_with_new_vars(made)
        name = entry_name(bound, last)
        bounds = {
            str(tokens.name): bound,
            str(rows.name): min(bound, max_logits_rows),
            str(sequences.name): min(bound, max_sequences),
        }
        lower = dict.fromkeys(bounds, 1)
        out[name] = (
            made.with_attr("global_symbol", name)
            .with_attr(MAX_TOKENS, bound)
            .with_attr("tir_var_upper_bound", bounds)
            .with_attr("tir_var_lower_bound", lower)
        )
    module = tvm.IRModule(out)
    return module.with_attrs(dict(mod.attrs)) if mod.attrs else module
