"""Products with packed weights against float64, in every storage format."""

import numpy as np
import pytest
from gpu_device import build, empty, normal, run
from gpu_experts import routed_rows
from gpu_formats import ALL, features_of
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import random_matrix

from llmc.formats import FORMATS
from llmc.targets.gpu import layout
from llmc.targets.gpu.kernels.grouped_linear import grouped_linear
from llmc.targets.gpu.kernels.grouped_tiles import FloatTile, grouped_tiles
from llmc.targets.gpu.kernels.linear import linear_few, linear_many
from llmc.targets.gpu.parameters import GemmParameters, GemvParameters, GpuParameters

# Sums of K products in float32, in whatever order: an error of some sqrt(K) roundings (6e-8) of
# the largest partial sum, which is measured by the largest output.
TOLERANCE = 2e-6
HALF_TOLERANCE = 1e-3  # outputs rounded to float16's 11 bits
M = 70  # neither a multiple of a panel nor of a tile
PARAMS = GpuParameters()
F32 = {"dtype": "float32", "vector_dtype": "float32"}
EXPERTS, TOP = 5, 2
# One of each way to decode a chunk; the product of one token shows all formats.
SOME = ("f32", "f16", "bf16", "w8", "q4_1", "q2_k", "q6_k")
SHAPED = {
    "splits": GemvParameters(splits=3, panels=2, token_tile=3),
    "one_split": GemvParameters(splits=1, panels=4, token_tile=8),
}
TILES = {
    "wide": GemmParameters(rows=32, tokens=64, depth=16, thread_rows=2, thread_tokens=8),
    "tall": GemmParameters(rows=128, tokens=16, depth=32, thread_rows=8, thread_tokens=2),
}


@pytest.fixture(scope="module")
def kernels():
    functions = {}
    for fmt in ALL:
        k = features_of(fmt)
        plain = {"bias": False, "residual": False, **F32}
        functions[f"one_{fmt.name}"] = linear_few(
            fmt, M, k, 1, bias=True, residual=True, params=PARAMS.gemv, **F32
        )
        if fmt.name in SOME:
            functions[f"few_{fmt.name}"] = linear_few(fmt, M, k, None, params=PARAMS.few, **plain)
            functions[f"many_{fmt.name}"] = linear_many(fmt, M, k, params=PARAMS.gemm, **plain)
    q4 = FORMATS["q4_1"]
    for name, params in SHAPED.items():
        functions[f"shaped_{name}"] = linear_few(
            q4, M, 160, None, bias=True, residual=False, params=params, **F32
        )
    for name, params in TILES.items():
        functions[f"shaped_{name}"] = linear_many(
            q4, M, 160, bias=True, residual=False, params=params, **F32
        )
    functions["odd"] = linear_few(
        FORMATS["f32"], 3, 7, None, bias=True, residual=False, params=PARAMS.few, **F32
    )
    half = {"bias": True, "residual": True, "dtype": "float16", "vector_dtype": "float16"}
    functions["half_few"] = linear_few(q4, M, 96, None, params=PARAMS.few, **half)
    functions["half_many"] = linear_many(q4, M, 96, params=PARAMS.gemm, **half)
    for name in ("f32", "q4_0"):
        for shared_input in (True, False):
            sizes = FORMATS[name], EXPERTS, M, 96, TOP
            options = {"per_token_input": shared_input, "bias": True, **F32}
            functions[f"few_experts_{name}_{shared_input}"] = grouped_linear(
                *sizes, tokens=None, params=PARAMS.gemv, **options
            )
            functions[f"experts_{name}_{shared_input}"] = grouped_tiles(
                *sizes, tile=FloatTile(TILES["tall"]), **options
            )
    return build(functions)


def weights_of(fmt, k, m=M):
    matrix, exact = random_matrix(np.random.default_rng(5), fmt, m, k)
    return layout.pack(fmt, [matrix], stacked=False), exact


def close(found, expected, tolerance=TOLERANCE):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_one_token_with_bias_and_residual(kernels, fmt):
    k = features_of(fmt)
    weights, exact = weights_of(fmt, k)
    x, bias, residual = normal(1, 1, k), normal(M), normal(1, 1, M)
    arrays = (x, *weights, bias, residual, empty(1, 1, M))
    (y,) = run(kernels[f"one_{fmt.name}"], *arrays, outputs=[-1])
    close(y, x.astype(np.float64) @ exact.T + bias + residual)


@pytest.mark.parametrize("form", ["few", "many"])
@pytest.mark.parametrize("name", SOME)
def test_more_tokens(kernels, name, form):
    fmt = FORMATS[name]
    k = features_of(fmt)
    weights, exact = weights_of(fmt, k)
    for tokens in (1, 7) if form == "few" else (1, 45):
        x = normal(1, tokens, k)
        (y,) = run(kernels[f"{form}_{fmt.name}"], x, *weights, empty(1, tokens, M), outputs=[-1])
        close(y, x.astype(np.float64) @ exact.T)


@pytest.mark.parametrize("name", [*SHAPED, *TILES])
@given(tokens=st.integers(1, 90))
@settings(max_examples=6, deadline=None)
def test_tuning_changes_speed_only(kernels, name, tokens):
    weights, exact = weights_of(FORMATS["q4_1"], 160)
    x, bias = normal(1, tokens, 160), normal(M)
    (y,) = run(kernels[f"shaped_{name}"], x, *weights, bias, empty(1, tokens, M), outputs=[-1])
    close(y, x.astype(np.float64) @ exact.T + bias)


def test_a_matrix_smaller_than_any_tile(kernels):
    weights, exact = weights_of(FORMATS["f32"], 7, 3)
    x, bias = normal(1, 5, 7), normal(3)
    (y,) = run(kernels["odd"], x, *weights, bias, empty(1, 5, 3), outputs=[-1])
    close(y, x.astype(np.float64) @ exact.T + bias)


@pytest.mark.parametrize("form", ["few", "many"])
def test_float16_activations_are_summed_in_float32(kernels, form):
    weights, exact = weights_of(FORMATS["q4_1"], 96)
    x, bias, residual = (
        a.astype(np.float16) for a in (normal(1, 9, 96), normal(M), normal(1, 9, M))
    )
    arrays = (x, *weights, bias, residual, empty(1, 9, M, dtype=np.float16))
    (y,) = run(kernels[f"half_{form}"], *arrays, outputs=[-1])
    close(y, x.astype(np.float64) @ exact.T + bias + residual, HALF_TOLERANCE)


@pytest.mark.parametrize("form", ["few_experts", "experts"])
@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("name", ["f32", "q4_0"])
def test_rows_go_through_the_experts_chosen_for_them(kernels, name, shared_input, form):
    kernel = kernels[f"{form}_{name}_{shared_input}"]
    sizes = {"num_experts": EXPERTS, "top_k": TOP, "shared_input": shared_input}
    for tokens in (1, 13, 60):
        case = routed_rows(FORMATS[name], M, 96, tokens=tokens, **sizes)
        (y,) = run(kernel, *case.arrays, empty(tokens * TOP, M), outputs=[-1])
        close(y, case.products + case.biases)
