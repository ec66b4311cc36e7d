"""Norms, activations, rotation, embedding and selection against NumPy in float64."""

import math

import numpy as np
import pytest
from gpu_device import build, empty, normal, run
from matrices import random_matrix

from llmc.errors import UnsupportedError
from llmc.formats import FORMATS
from llmc.targets.gpu import layout
from llmc.targets.gpu.kernels.activation import ACTIVATIONS, gated_activation
from llmc.targets.gpu.kernels.embedding import embedding
from llmc.targets.gpu.kernels.kv_write import rope
from llmc.targets.gpu.kernels.norm import add_rms_norm, layer_norm, rms_norm
from llmc.targets.gpu.kernels.top_k import top_k
from llmc.targets.gpu.parameters import Features, GpuParameters

EPS = 1e-5
# One float32 rounding of a value of size 1 is 6e-8; each kernel makes a dozen, sums of a row a few
# more. Vulkan grants exp 3 + 2|x| units in the last place.
TOLERANCE = 3e-6
HALF_TOLERANCE = 2e-3  # a float16 has 11 bits
ROWS = (1, 3, 70)
PARAMS = GpuParameters()
SUBGROUPS = GpuParameters(
    features=Features(subgroup=8, subgroup_extern=("subgroupAdd", "subgroupMax"))
)
F32 = {"dtype": "float32", "params": PARAMS}
VECTOR = {**F32, "vector_dtype": "float32"}
EMBEDDINGS = {"f32": 66, "f16": 72, "q4_1": 96, "q6_k": 256, "q2_k": 256, "w8": 50}


@pytest.fixture(scope="module")
def kernels():
    functions = {
        "rms": rms_norm(features=576, eps=EPS, offset=0.0, heads=None, tokens=None, **VECTOR),
        "rms_odd": rms_norm(features=37, eps=EPS, offset=1.0, heads=None, tokens=None, **VECTOR),
        "rms_heads": rms_norm(features=64, eps=EPS, offset=0.0, heads=3, tokens=None, **VECTOR),
        "rms_one": rms_norm(features=576, eps=EPS, offset=0.0, heads=None, tokens=1, **VECTOR),
        "rms_f16": rms_norm(
            features=576,
            eps=EPS,
            offset=0.0,
            heads=None,
            tokens=None,
            dtype="float16",
            vector_dtype="float16",
            params=PARAMS,
        ),
        "rms_subgroups": rms_norm(
            features=576,
            eps=EPS,
            offset=0.0,
            heads=None,
            tokens=None,
            **{**VECTOR, "params": SUBGROUPS},
        ),
        "add_rms": add_rms_norm(features=200, eps=EPS, offset=1.0, tokens=None, **VECTOR),
        "layer": layer_norm(features=130, eps=EPS, tokens=None, **VECTOR),
        "rope": rope(heads=3, head_dim=64, rotary_dim=64, tokens=None, **F32),
        "rope_partial": rope(heads=2, head_dim=80, rotary_dim=32, tokens=None, **F32),
        "top_k": top_k(columns=60, k=6, tokens=None, **F32),
    }
    for kind in ACTIVATIONS:
        functions[f"gate_{kind}"] = gated_activation(inner=150, kind=kind, tokens=None, **F32)
    for name, e in EMBEDDINGS.items():
        functions[f"embedding_{name}"] = embedding(FORMATS[name], 70, e, tokens=None, **F32)
    return build(functions)


def rms(x, weight):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("name", "lead", "features", "offset"),
    [
        ("rms", (), 576, 0.0),
        ("rms_odd", (), 37, 1.0),
        ("rms_heads", (3,), 64, 0.0),
        ("rms_subgroups", (), 576, 0.0),
    ],
)
def test_rms_norm_matches_numpy(kernels, name, lead, features, offset, rows):
    x, weight = 5 * normal(1, rows, *lead, features), normal(features)
    (y,) = run(kernels[name], x, weight, empty(*x.shape), outputs=[2])
    np.testing.assert_allclose(y, rms(x, weight + offset), atol=TOLERANCE, rtol=TOLERANCE)


def test_rms_norm_of_one_token_of_zeros_is_zero(kernels):
    x, weight = normal(1, 1, 576), normal(576)
    (y,) = run(kernels["rms_one"], x, weight, empty(*x.shape), outputs=[2])
    np.testing.assert_allclose(y, rms(x, weight), atol=TOLERANCE, rtol=TOLERANCE)
    (y,) = run(kernels["rms_one"], 0 * x, weight, empty(*x.shape), outputs=[2])
    assert not y.any()


def test_rms_norm_of_float16_sums_in_float32(kernels):
    # Squares of 300 pass float16's largest number.
    x, weight = (300 * normal(1, 3, 576)).astype(np.float16), normal(576).astype(np.float16)
    (y,) = run(kernels["rms_f16"], x, weight, empty(*x.shape, dtype=np.float16), outputs=[2])
    np.testing.assert_allclose(y, rms(x, weight), atol=HALF_TOLERANCE, rtol=HALF_TOLERANCE)


@pytest.mark.parametrize("rows", ROWS)
def test_add_rms_norm_gives_the_sum_and_its_norm(kernels, rows):
    x, residual, weight = normal(1, rows, 200), 3 * normal(1, rows, 200)[:, ::-1], normal(200)
    arrays = (x, residual.copy(), weight, empty(*x.shape), empty(*x.shape))
    total, y = run(kernels["add_rms"], *arrays, outputs=[3, 4])
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_allclose(y, rms(x + residual, weight + 1), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("rows", ROWS)
def test_layer_norm_keeps_precision_far_from_zero(kernels, rows):
    # A mean 100 times the deviation: a difference of squares would lose four digits.
    x, weight, bias = normal(1, rows, 130) + 100, normal(130), normal(130, 1)[:, 0]
    (y,) = run(kernels["layer"], x, weight, bias, empty(*x.shape), outputs=[3])
    centred = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * weight + bias
    # The mean is rounded at size 100, a few times 8e-6, and multiplied by weights up to 4.
    np.testing.assert_allclose(y, expected, atol=1e-4, rtol=0)


REFERENCES = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gated_activation_matches_numpy_far_out_too(kernels, kind):
    x = normal(1, 3, 300) * np.float32(4)
    x[0, 0, :4] = 100, -100, 30, -30
    (y,) = run(kernels[f"gate_{kind}"], x, empty(1, 3, 150), outputs=[1])
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    # GELU's error function is good to 3e-7, times gates of some 10 and ups of as much.
    atol = 3e-5 if kind == "gelu" else 2e-5
    np.testing.assert_allclose(y, REFERENCES[kind](gate) * up, atol=atol, rtol=TOLERANCE)


def test_unknown_activation_is_named():
    with pytest.raises(UnsupportedError, match="swish9"):
        gated_activation(inner=8, kind="swish9", tokens=None, **F32)


def rotated(x, cos, sin):
    """RoFormer on the first R features of `[1, T, H, D]`, halves paired, float64."""
    r = cos.shape[-1]
    x, cos, sin = (a.astype(np.float64) for a in (x, cos[:, :, None], sin[:, :, None]))
    turned = np.concatenate([-x[..., r // 2 : r], x[..., : r // 2]], axis=-1)
    return np.concatenate([x[..., :r] * cos + turned * sin, x[..., r:]], axis=-1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("name", "heads", "d", "r"), [("rope", 3, 64, 64), ("rope_partial", 2, 80, 32)]
)
def test_rope_matches_numpy(kernels, name, heads, d, r, rows):
    x, cos, sin = normal(1, rows, heads, d), normal(1, rows, r), normal(1, rows, r)[:, ::-1].copy()
    (y,) = run(kernels[name], x, cos, sin, empty(*x.shape), outputs=[3])
    np.testing.assert_allclose(y, rotated(x, cos, sin), atol=TOLERANCE, rtol=0)


def test_rope_of_odd_size_is_named():
    with pytest.raises(UnsupportedError, match="7"):
        rope(heads=1, head_dim=8, rotary_dim=7, tokens=None, **F32)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embedding_gives_the_rows_of_the_packed_matrix(kernels, name):
    fmt, e = FORMATS[name], EMBEDDINGS[name]
    matrix, exact = random_matrix(np.random.default_rng(1), fmt, 70, e)
    weights = layout.pack(fmt, [matrix], stacked=False)
    ids = np.array([[0, 69, 31, 32, 5]], np.int32)
    (y,) = run(kernels[f"embedding_{name}"], ids, *weights, empty(1, 5, e), outputs=[-1])
    np.testing.assert_allclose(y[0], exact[ids[0]], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_top_k_is_a_stable_descending_selection(kernels, rows):
    # Few distinct values: ties everywhere, which come in the order of their columns.
    x = np.random.default_rng(rows).integers(-5, 5, (rows, 60)).astype(np.float32)
    outputs = (empty(rows, 6), empty(rows, 6, dtype=np.int32))
    values, indices = run(kernels["top_k"], x, *outputs, outputs=[1, 2])
    expected = np.argsort(-x, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=1))
