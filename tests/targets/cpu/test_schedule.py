"""Scheduled functions of LegalizeOps and FuseTIR give NumPy's numbers for any number of rows."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import relax as R
from tvm.script import tirx as T

from llmc.targets.cpu.kernels.norm import rms_norm
from llmc.targets.cpu.schedule import schedule_elementwise, schedule_reduction

WIDTH = 64
# 3 rows run serially, 3,000 rows of 64 are past the threshold of threads everywhere.
ROWS = (1, 3, 3000)
# Float32 arithmetic on values of size 1, sums of 64 of them: a few roundings of 6e-8 relative.
TOLERANCE = 2e-5


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ELEMENTWISE = {
    "tanh_cap": (
        lambda x, w, i: R.multiply(R.const(3.0), R.tanh(R.divide(x, R.const(3.0)))),
        lambda x, w, i: 3 * np.tanh(x / 3),
    ),
    "silu_chain": (
        lambda x, w, i: R.exp(R.add(R.multiply(R.sigmoid(x), x), w)),
        lambda x, w, i: np.exp(sigmoid(x) * x + w),
    ),
    "take": (lambda x, w, i: R.take(w, i, axis=0), lambda x, w, i: w[i]),
    "concat": (
        lambda x, w, i: R.concat([x, R.add(x, x)], axis=-1),
        lambda x, w, i: np.concatenate([x, 2 * x], -1),
    ),
    "transpose": (
        lambda x, w, i: R.permute_dims(x, [0, 2, 1]),
        lambda x, w, i: x.transpose(0, 2, 1),
    ),
    "slice": (
        lambda x, w, i: R.strided_slice(x, axes=[2], begin=[1], end=[31]),
        lambda x, w, i: x[..., 1:31],
    ),
    "cast": (lambda x, w, i: R.astype(x, "float16"), lambda x, w, i: x.astype(np.float16)),
    "where": (
        lambda x, w, i: R.where(R.greater(x, R.const(0.0)), x, R.negative(x)),
        lambda x, w, i: np.abs(x),
    ),
}
REDUCTIONS = {
    "softmax": (lambda x, w, i: R.nn.softmax(x, axis=-1), lambda x, w, i: softmax(x)),
    "rms": (
        lambda x, w, i: R.rsqrt(
            R.add(R.mean(R.multiply(x, x), axis=[-1], keepdims=True), R.const(1e-5))
        ),
        lambda x, w, i: 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5),
    ),
    "sum_of_squares": (
        lambda x, w, i: R.sum(R.multiply(x, x), axis=[-1]),
        lambda x, w, i: (x * x).sum(-1),
    ),
    "max_over_rows": (lambda x, w, i: R.max(x, axis=[1]), lambda x, w, i: x.max(1)),
    "argmax": (lambda x, w, i: R.argmax(x, axis=-1), lambda x, w, i: x.argmax(-1)),
    "layer_norm": (
        lambda x, w, i: R.nn.layer_norm(x, w, w, axes=[-1]),
        lambda x, w, i: (
            (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + w
        ),
    ),
    "matmul": (
        lambda x, w, i: R.matmul(x, R.reshape(w, (WIDTH, 1))),
        lambda x, w, i: x @ w[:, None],
    ),
}
CASES = ELEMENTWISE | REDUCTIONS


def fused(expression, rows):
    """The fused but unscheduled module of one expression of x `[1, n, 64]`, w `[64]`, i `[n]`."""
    n = tvm.tirx.Var("n", "int64") if rows is None else rows
    x = relax.Var("x", R.Tensor((1, n, WIDTH), "float32"))
    w = relax.Var("w", R.Tensor((WIDTH,), "float32"))
    i = relax.Var("i", R.Tensor((n,), "int32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w, i]):
        with builder.dataflow():
            out = builder.emit_output(builder.normalize(expression(x, w, i)))
        builder.emit_func_output(out)
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    return tvm.transform.Sequential(passes)(builder.get())


def scheduled(module, rule):
    """The module with every PrimFunc through `rule`, and how many it took."""
    taken = 0
    for variable, func in module.functions.items():
        if isinstance(func, tvm.tirx.PrimFunc) and (new := rule(func)) is not None:
            module[variable] = new
            taken += 1
    return module, taken


def compiled(module):
    return relax.VirtualMachine(
        tvm.compile(module, target=tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})),
        tvm.cpu(),
    )


def any_rule(func):
    new = schedule_elementwise(func)
    return schedule_reduction(func) if new is None else new


@pytest.mark.parametrize("name", CASES)
def test_scheduled_functions_match_numpy(name):
    expression, reference = CASES[name]
    module, taken = scheduled(fused(expression, None), any_rule)
    assert taken
    machine = compiled(module)
    for rows in ROWS:
        rng = np.random.default_rng(rows)
        x = rng.standard_normal((1, rows, WIDTH)).astype(np.float32)
        w = rng.standard_normal(WIDTH).astype(np.float32)
        i = rng.integers(0, WIDTH, rows).astype(np.int32)
        got = machine["main"](*map(tvm.runtime.tensor, (x, w, i))).numpy()
        expected = reference(x.astype(np.float64), w.astype(np.float64), i)
        np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_each_rule_takes_its_kind_only(name):
    wrong = schedule_reduction if name in ELEMENTWISE else schedule_elementwise
    functions = fused(CASES[name][0], None).functions.values()
    main_parts = [f for f in functions if isinstance(f, tvm.tirx.PrimFunc)]
    refused = [wrong(f) is None for f in main_parts]
    # A reduction's module may hold a map beside it (a reshape), never the other way round.
    assert all(refused) if name in ELEMENTWISE else any(refused)


def test_a_short_static_function_wakes_no_thread():
    module, taken = scheduled(fused(CASES["silu_chain"][0], 1), schedule_elementwise)
    assert taken == 1
    assert "parallel" not in module.script()


def test_a_symbolic_function_chooses_between_one_thread_and_many():
    module, _ = scheduled(fused(CASES["silu_chain"][0], None), schedule_elementwise)
    assert "T.parallel" in module.script()
    assert re.search(r"if n <= ", module.script())


def test_no_libm_call_is_left_in_a_scheduled_function():
    for name in ("silu_chain", "tanh_cap", "softmax"):
        module, _ = scheduled(fused(CASES[name][0], None), any_rule)
        func = next(f for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc))
        library = tvm.compile(
            tvm.IRModule({"f": func.with_attr("global_symbol", "f")}),
            target=tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"}),
        )
        called = re.findall(r"call\w*\s+(\w+)", library.mod.inspect_source("asm"))
        assert not {"expf", "exp", "tanhf", "tanh"} & set(called), name


def test_scheduled_and_unprovable_functions_are_left_alone():
    hand_written = rms_norm(features=16, eps=1e-5)
    assert schedule_elementwise(hand_written) is None
    assert schedule_reduction(hand_written) is None

    @T.prim_func(s_tir=True)
    def scan(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        for i in range(63):
            with T.sblock("scan"):
                v = T.axis.opaque(63, i)
                y[v + 1] = y[v] + x[v]

    assert schedule_elementwise(scan) is None
    assert schedule_reduction(scan) is None
