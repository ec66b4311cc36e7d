"""Integer products against float64 on the same codes, in every distinct storage of weights.

Tolerance: sums of codes are exact; what is rounded are the float32 scalings, one a unit, so the
error stays within a few 2^-24 of Σ|x·w|, for which 2e-6 has room. One wrong code of 640 shows as
1e-3.
"""

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import DISTINCT, HOST, build, random_matrix, tensor

from llmc.formats import FORMATS
from llmc.targets.cpu.kernels.integer import activation_block, sum_factor, unit_of
from llmc.targets.cpu.kernels.integer_linear import integer_linear
from llmc.targets.cpu.kernels.quantize_activations import quantize_activations
from llmc.targets.cpu.layout import pack
from llmc.targets.cpu.parameters import PARAMETERS

PARAMS = PARAMETERS["avx512vnni"].integer
HAS_BYTES = tvm.target.codegen.target_has_features(
    "avx512vnni", tvm.target.Target({"kind": "llvm", "mcpu": HOST})
)
pytestmark = pytest.mark.skipif(not HAS_BYTES, reason="this CPU has no AVX-512 VNNI")

M, K = 72, 640  # four panels and a half; not a multiple of 256
AFFINE = [f for f in DISTINCT if not f.is_float]
TOLERANCE = 2e-6


def key(fmt, kind):
    return f"{fmt.name}_{kind}".replace("-", "_")


def product(fmt, tokens, **options):
    block = activation_block(fmt, K, options.pop("block", PARAMS.block))
    options = {"bias": True, "residual": tokens is None, **options}
    return integer_linear(fmt, M, K, tokens, block=block, params=PARAMS, **options)


@pytest.fixture(scope="module")
def library():
    functions = {}
    for fmt in AFFINE:
        functions[key(fmt, "one")] = product(fmt, 1)
        functions[key(fmt, "many")] = product(fmt, None)
    wide = FORMATS["q4_1"]
    functions["wide"] = product(wide, None, block=128)
    for name, block, unit in (("fine", 32, 16), ("coarse", 128, 32)):
        functions[f"quantize_{name}"] = quantize_activations(
            features=K, block=block, unit=unit, factor=-8
        )
    return build(functions)


def check(function, fmt, tokens, block, *, residual):
    rng = np.random.default_rng(tokens)
    matrix, exact = random_matrix(rng, fmt, M, K)
    codes = rng.integers(-127, 128, (1, tokens, K)).astype(np.int8)
    scales = rng.uniform(0, 0.02, (1, tokens, K // block)).astype(np.float32)
    unit = unit_of(fmt, block)
    units = codes.reshape(1, tokens, K // unit, unit).astype(np.int32)
    sums = (units.sum(-1) * sum_factor(fmt)).astype(np.int32)
    bias = rng.standard_normal(M).astype(np.float32)
    extra = [bias] + ([rng.standard_normal((1, tokens, M)).astype(np.float32)] if residual else [])
    y = tensor(np.full((1, tokens, M), np.nan, np.float32))
    function(*(tensor(a) for a in (codes, scales, sums, *pack(fmt, matrix), *extra)), y)
    x = codes[0].reshape(tokens, K // block, block) * scales[0].astype(np.float64)[:, :, None]
    x = x.reshape(tokens, K)
    expected = x @ exact.T + sum(e.reshape(-1, M) for e in extra)
    # Codes are multiplied unsigned, so a zero point's part counts as well.
    low = exact.min() if fmt.has_min else -np.abs(exact).max()
    magnitude = np.abs(x) @ (np.abs(exact) + np.abs(low)).T + 1
    assert (np.abs(y.numpy()[0] - expected) <= TOLERANCE * magnitude).all()


@pytest.mark.parametrize("fmt", AFFINE, ids=lambda f: f.name)
def test_one_token(library, fmt):
    block = activation_block(fmt, K, PARAMS.block)
    check(library[key(fmt, "one")], fmt, 1, block, residual=False)


@pytest.mark.parametrize("fmt", AFFINE, ids=lambda f: f.name)
@settings(max_examples=8, deadline=None)
@given(tokens=st.integers(0, 40))
def test_any_number_of_tokens(library, fmt, tokens):
    block = activation_block(fmt, K, PARAMS.block)
    check(library[key(fmt, "many")], fmt, tokens, block, residual=True)


def test_several_groups_of_weights_share_a_scale_of_activations(library):
    check(library["wide"], FORMATS["q4_1"], 7, 128, residual=True)


@pytest.mark.parametrize(("name", "block", "unit"), [("fine", 32, 16), ("coarse", 128, 32)])
def test_activations_are_rounded_to_the_nearest_of_255_steps(library, name, block, unit):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, 5, K)).astype(np.float32) * 10
    x[0, 1, :block] = 0  # a block of nothing has scale zero, not a division by it
    codes = tensor(np.full(x.shape, 99, np.int8))
    scales = tensor(np.full((1, 5, K // block), np.nan, np.float32))
    sums = tensor(np.zeros((1, 5, K // unit), np.int32))
    library[f"quantize_{name}"](tensor(x), codes, scales, sums)
    blocks = x.reshape(1, 5, -1, block)
    np.testing.assert_allclose(
        scales.numpy(), np.abs(blocks).max(-1) / 127, rtol=1e-6, err_msg="scales"
    )
    whole = codes.numpy().astype(np.int32)
    error = np.abs(whole.reshape(blocks.shape) * scales.numpy()[..., None] - blocks)
    assert (error <= 0.5001 * scales.numpy()[..., None]).all()
    assert (whole.reshape(blocks.shape)[0, 1, 0] == 0).all()
    assert (sums.numpy() == -8 * whole.reshape(1, 5, -1, unit).sum(-1)).all()


def test_rows_that_no_block_divides_stay_in_floats():
    assert activation_block(FORMATS["w8"], 100, 32) is None
    assert activation_block(FORMATS["f32"], 640, 32) is None
    assert activation_block(FORMATS["w8"], 96, 32) == 32
    assert activation_block(FORMATS["w4-g128"], 640, 32) == 128
