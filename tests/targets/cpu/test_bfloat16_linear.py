"""bfloat16 products against float64 on the same numbers.

Tolerance: products are exact, 300 pairs are summed in float32 in up to eight chains: about √300 ·
2^-24 = 1e-6 of Σ|x·w| at worst.
"""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from host_library import HostLibrary
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import build, tensor

from llmc.formats import FORMATS
from llmc.targets.cpu.kernels.bfloat16_linear import bfloat16_linear, round_activations
from llmc.targets.cpu.kernels.outputs import Gated, Rounded
from llmc.targets.cpu.layout import pack
from llmc.targets.cpu.parameters import PARAMETERS

PARAMS = PARAMETERS["avx512bf16"].bfloat16
M, K = 72, 602  # four panels and a half; a number of pairs that no step divides


INNER = 48


def rounded_gate(count):
    return Gated(kind="relu", output=Rounded.arguments(count, INNER))


@pytest.fixture(scope="module")
def library():
    functions = {
        "one": bfloat16_linear(M, K, 1, bias=True, residual=False, params=PARAMS),
        "many": bfloat16_linear(M, K, None, bias=False, residual=True, params=PARAMS),
    }
    short = replace(PARAMS, chunk=100)  # seven chunks of 43 pairs
    functions["chunks"] = bfloat16_linear(M, K, None, bias=False, residual=True, params=short)
    for name, tokens in (("gated_one", 1), ("gated_many", None)):
        functions[name] = bfloat16_linear(
            2 * INNER, K, tokens, bias=False, residual=False, params=PARAMS, gate=rounded_gate
        )
    return HostLibrary(functions, "avx512bf16")


def check(library, name, tokens, *, bias, residual):
    rng = np.random.default_rng(tokens)
    weights = rng.standard_normal((M, K)).astype(ml_dtypes.bfloat16)
    x = rng.standard_normal((1, tokens, K)).astype(ml_dtypes.bfloat16)
    extra = [rng.standard_normal(M).astype(np.float32)] if bias else []
    extra += [rng.standard_normal((1, tokens, M)).astype(np.float32)] if residual else []
    y = np.full((1, tokens, M), np.nan, np.float32)
    got = library.run(name, x.view(np.uint16), *pack(FORMATS["bf16"], [weights]), *extra, y)
    exact, factors = weights.astype(np.float64), x[0].astype(np.float64)
    expected = factors @ exact.T + sum(e.reshape(-1, M) for e in extra)
    magnitude = np.abs(factors) @ np.abs(exact.T) + 1
    assert (np.abs(got[0] - expected) <= 1e-6 * magnitude).all()


def test_one_token(library):
    check(library, "one", 1, bias=True, residual=False)


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(0, 40))
def test_any_number_of_tokens(library, tokens):
    check(library, "many", tokens, bias=False, residual=True)


@pytest.mark.parametrize("tokens", [0, 1, 6, 7, 40])
def test_long_rows_are_multiplied_by_chunks(library, tokens):
    check(library, "chunks", tokens, bias=False, residual=True)


@pytest.mark.parametrize(("name", "tokens"), [("gated_one", 1), ("gated_many", 19)])
def test_gated_outputs_are_rounded(library, name, tokens):
    rng = np.random.default_rng(tokens)
    weights = rng.standard_normal((2 * INNER, K)).astype(ml_dtypes.bfloat16)
    x = rng.standard_normal((1, tokens, K)).astype(ml_dtypes.bfloat16)
    y = np.zeros((1, tokens, INNER), np.uint16)
    y = library.run(name, x.view(np.uint16), *pack(FORMATS["bf16"], [weights]), y)
    sums = x[0].astype(np.float64) @ weights.astype(np.float64).T
    expected = np.maximum(sums[:, :INNER], 0) * sums[:, INNER:]
    got = y[0].view(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_allclose(got, expected, rtol=2**-8, atol=1e-2)


def test_activations_are_rounded_to_the_nearest_with_ties_to_even():
    rounded = build({"round": round_activations(K)})["round"]
    x = np.random.default_rng(0).standard_normal((1, 3, K)).astype(np.float32)
    x[0, 0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, 0.0, -1e30]
    y = tensor(np.zeros(x.shape, np.uint16))
    rounded(tensor(x), y)
    assert (y.numpy() == x.astype(ml_dtypes.bfloat16).view(np.uint16)).all()
