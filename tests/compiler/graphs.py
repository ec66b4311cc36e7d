"""Builds the small Relax functions that tests of passes compare.

Every function starts with the three inputs of a traced model; T and L are shared by all graphs of a
test run, so that modules compare structurally.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from llmc.compiler import weight_plan
from llmc.compiler.rewriter import apply_rule
from llmc.compiler.weight_plan import WeightSpec

T = tvm.tirx.Var("T", "int64")
L = tvm.tirx.Var("L", "int64")
INPUTS = {
    "input_ids": ([1, T], "int32"),
    "positions": ([1, T], "int32"),
    "logits_rows": ([L], "int32"),
}

Emit = Callable[[relax.Expr], relax.Var]


def graph(body: Callable[..., relax.Expr], **params: list) -> tvm.IRModule:
    """A module whose `main` returns `body(emit, **variables)`.

    A parameter is a shape (float32), or a pair of shape and dtype.
    """
    types = {n: p if isinstance(p, tuple) else (p, "float32") for n, p in params.items()}
    types = INPUTS | types  # the inputs first, in their order
    variables = {n: relax.Var(n, relax.TensorType(s, d)) for n, (s, d) in types.items()}
    builder = relax.BlockBuilder()
    with builder.function("main", list(variables.values())):
        with builder.dataflow():
            given = {n: variables[n] for n in params}
            result = builder.emit_output(body(builder.emit, **given))
        builder.emit_func_output(result)
    return builder.get()


def planned(mod: tvm.IRModule, **formats: str | WeightSpec) -> tvm.IRModule:
    """`mod` with a plan: each parameter after the inputs is a source of its own name."""
    plan = {}
    for param in mod["main"].params[len(INPUTS) :]:
        given = formats.get(param.name, "f32")
        plan[param.name] = (
            WeightSpec(sources=[param.name], format=given) if isinstance(given, str) else given
        )
    return weight_plan.attach(mod, plan)


def settled(mod: tvm.IRModule) -> tvm.IRModule:
    """`mod` after the tidying that every rewrite ends with."""
    return apply_rule(mod, lambda call, scope: None)


def assert_becomes(
    transform: Callable[[tvm.IRModule], tvm.IRModule],
    before: tvm.IRModule,
    expected: tvm.IRModule,
) -> None:
    """Structural equality of what `transform` makes of `before` with the tidied `expected`."""
    assert_structural_equal(transform(before), settled(expected), map_free_vars=True)


def assert_unchanged(transform: Callable[[tvm.IRModule], tvm.IRModule], mod: tvm.IRModule) -> None:
    """`transform` leaves `mod` alone."""
    assert_becomes(transform, mod, mod)


def assert_idempotent(transform: Callable[[tvm.IRModule], tvm.IRModule], mod: tvm.IRModule) -> None:
    """A second round changes nothing."""
    once = transform(mod)
    assert_structural_equal(transform(once), once, map_free_vars=True)
