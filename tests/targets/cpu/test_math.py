"""The polynomials against float64, and that no call to libm is left in a kernel."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from llmc.targets.cpu.kernels import math as kernels_math
from llmc.targets.cpu.kernels.math import EXP2_LOWEST

LANES = 16
# name: (reference, lowest and highest argument, units in the last place)
FUNCTIONS = {
    "exp": (np.exp, -87.0, 88.0, 2),
    "exp2": (np.exp2, EXP2_LOWEST, 127.0, 3),
    "nearest": (np.round, -1e6, 1e6, 0),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), -80.0, 80.0, 4),
    "tanh": (np.tanh, -12.0, 12.0, 8),
    "erf": (None, -6.0, 6.0, 8),
}


def unary(function, lanes):
    @T.prim_func(s_tir=True)
    def kernel(x_h: T.handle, y_h: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        n = T.int64()
        x = T.match_buffer(x_h, (n, LANES), "float32")
        y = T.match_buffer(y_h, (n, lanes), "float32")
        for i in range(n):
            with T.sblock("row"):
                if lanes == 1:
                    y[i, 0] = function(x[i, T.ramp(0, 1, LANES)])
                else:
                    y[i, T.ramp(0, 1, LANES)] = function(x[i, T.ramp(0, 1, LANES)])

    return kernel


@pytest.fixture(scope="module")
def kernels():
    functions = {name: unary(getattr(kernels_math, name), LANES) for name in FUNCTIONS}
    functions |= {name: unary(getattr(kernels_math, name), 1) for name in ("lane_sum", "lane_max")}
    module = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()})
    return tvm.compile(module, target=tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"}))


def apply(kernel, x, lanes=LANES):
    y = tvm.runtime.tensor(np.zeros((len(x), lanes), np.float32))
    kernel(tvm.runtime.tensor(x), y)
    return y.numpy()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_polynomials_are_within_their_stated_error(kernels, name):
    reference, low, high, ulps = FUNCTIONS[name]
    x = np.linspace(low, high, 1 << 18, dtype=np.float32).reshape(-1, LANES)
    if reference is None:
        torch = pytest.importorskip("torch")
        expected = torch.erf(torch.from_numpy(x.astype(np.float64))).numpy()
    else:
        expected = reference(x.astype(np.float64))
    error = np.abs(apply(kernels[name], x) - expected)
    assert (error <= ulps * np.spacing(np.abs(expected).astype(np.float32))).all()


def test_ends_of_the_range_are_exact(kernels):
    x = np.zeros((1, LANES), np.float32)
    x[0, :4] = -np.inf, -88.5, 89.0, np.inf
    assert apply(kernels["exp"], x)[0, :5].tolist() == [0, 0, np.inf, np.inf, 1]
    assert apply(kernels["exp2"], x)[0, 0] == 2.0**EXP2_LOWEST
    assert apply(kernels["exp2"], x)[0, 4] == 1
    assert apply(kernels["sigmoid"], x)[0, :5].tolist() == [0, 0, 1, 1, 0.5]
    assert apply(kernels["tanh"], x)[0, 4] == 0
    np.testing.assert_allclose(apply(kernels["tanh"], x)[0, :4], [-1, -1, 1, 1], atol=2e-7)
    np.testing.assert_allclose(apply(kernels["erf"], x)[0, :4], [-1, -1, 1, 1], atol=4e-7)


def test_lanes_fold_to_their_sum_and_maximum(kernels):
    x = np.random.default_rng(0).standard_normal((50, LANES)).astype(np.float32)
    # Sixteen terms of size 1 in four levels: four roundings of 1e-7.
    np.testing.assert_allclose(apply(kernels["lane_sum"], x, 1)[:, 0], x.sum(1), atol=2e-6)
    np.testing.assert_array_equal(apply(kernels["lane_max"], x, 1)[:, 0], x.max(1))


def test_no_libm_call_is_left(kernels):
    called = set(re.findall(r"call\w*\s+(\w+)", kernels.mod.inspect_source("asm")))
    assert not {name for name in called if re.fullmatch(r"(exp|tanh|erf|fmax|floor)f?", name)}
