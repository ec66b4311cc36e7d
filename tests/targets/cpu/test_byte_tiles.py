"""Products of bytes in matrix registers (kernels/byte_tiles.py) against float64.

As in test_tiles.py, the tile instructions are emulated where the processor has none.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulated_tiles import Library, needs_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_products import AFFINE, Case, check_gated, quantized_gate
from matrices import random_matrix

from llmc.formats import FORMATS
from llmc.targets.cpu.kernels.byte_tiles import takes
from llmc.targets.cpu.kernels.integer import activation_block
from llmc.targets.cpu.kernels.integer_linear import integer_linear
from llmc.targets.cpu.parameters import PARAMETERS, TileParameters, Tiling

# Row blocks of 32 rows, columns of four panels and three chunks of features, the last a short one.
TILES = TileParameters(crossover=0, rows=32, panels=4, min_columns=1, steps=5, ahead=1)
BYTES = replace(
    PARAMETERS["amx"].integer,
    byte_tiles=TILES,
    code_tiles=None,
    tiling=Tiling(panels=1, token_tiles=(1,)),
    composed=None,
)
WHOLE = replace(BYTES, byte_tiles=replace(TILES, steps=12))  # one chunk
BEFORE = replace(BYTES, byte_tiles=replace(TILES, ahead=99))  # weights are unpacked before a stage
LONG = replace(BYTES, byte_tiles=replace(TILES, rows=96))  # blocks of rows follow each other

DEFAULT = replace(BYTES, byte_tiles=PARAMETERS["amx"].integer.byte_tiles)

K = 768
# Rows of weights: five panels, four, half a one.
SHAPES = {"odd": (72, LONG), "even": (64, BYTES), "one": (9, BYTES), "before": (72, BEFORE)}
# A block of several groups, one longer than a chunk, and one that no step divides.
BLOCKS = {"wide": ("q4_1", 128), "long": ("w8", 384), "short": ("w8", 96)}
GATED = {"scaled": ("q4_0", LONG), "minimums": ("q4_1", WHOLE), "before": ("q4_0", BEFORE)}
TOLERANCE = 7e-4
"""Of Σ|x·w|: both factors are rounded by half a 127th of their chunk's largest at most, in random
directions; the most seen is 4.4e-4. One wrong code of 768 shows as 1e-3.
"""
EXTREME_TOLERANCE = 4e-3
"""Where all numbers of a row are of one size and sign, their roundings are, too."""

pytestmark = needs_vectors


def key(fmt):
    return fmt.name.replace("-", "_")


def linear(fmt, m, block, params=BYTES, k=K):
    return integer_linear(fmt, m, k, None, block=block, bias=True, residual=True, params=params)


def gated(fmt, params, k=K):
    fmt = FORMATS[fmt]
    gate = quantized_gate(fmt, 192, "silu")
    block = activation_block(fmt, k, 32)
    return integer_linear(
        fmt, 192, k, None, block=block, bias=True, residual=False, params=params, gate=gate
    )


@pytest.fixture(scope="module")
def library():
    functions = {key(f): linear(f, 72, activation_block(f, K, 32)) for f in AFFINE}
    functions |= {n: linear(FORMATS[f], 40, block) for n, (f, block) in BLOCKS.items()}
    functions |= {f"rows_{n}": linear(FORMATS["q4_0"], m, 32, p) for n, (m, p) in SHAPES.items()}
    functions |= {f"gated_{n}": gated(*GATED[n]) for n in GATED}
    functions |= {"whole": linear(FORMATS["q4_0"], 72, 32, WHOLE)}
    functions |= {"default": linear(FORMATS["q8_0"], 304, 32, DEFAULT, 4096)}
    return Library(functions | {"gated_default": gated("q4_0", DEFAULT, 2048)})


def check(library, name, case, tolerance=TOLERANCE):
    case.check(lambda *arrays: library.run(name, *arrays), tolerance)


@pytest.mark.parametrize("fmt", AFFINE, ids=lambda f: f.name)
@settings(max_examples=5, deadline=None)
@given(tokens=st.integers(1, 80))
def test_every_format(library, fmt, tokens):
    check(library, key(fmt), Case(fmt, 72, K, tokens, activation_block(fmt, K, 32)))


@pytest.mark.parametrize("fmt", AFFINE, ids=lambda f: f.name)
def test_ends_of_ranges(library, fmt):
    """Nothing overflows its 16 bits."""
    case = Case(fmt, 72, K, 21, activation_block(fmt, K, 32), extreme=True)
    check(library, key(fmt), case, EXTREME_TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
# A rest of each kind behind none, one and two row blocks.
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65, 95])
def test_every_number_of_tiles(library, shape, tokens):
    check(library, f"rows_{shape}", Case(FORMATS["q4_0"], SHAPES[shape][0], K, tokens, 32))


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_other_sizes(library, name):
    fmt, block = BLOCKS[name]
    check(library, name, Case(FORMATS[fmt], 40, K, 27, block))


@pytest.mark.parametrize("name", GATED)
@settings(max_examples=5, deadline=None)
@given(tokens=st.integers(1, 80))
def test_gated_products(library, name, tokens):
    fmt = FORMATS[GATED[name][0]]
    case = Case(fmt, 192, K, tokens, activation_block(fmt, K, 32), residual=False)
    check_gated(case, lambda *a: library.run_all(f"gated_{name}", *a), TOLERANCE)


def test_the_table_s_own_parameters(library):
    """Two chunks of 32 steps, tasks of two sizes, a last block of few rows."""
    check(library, "default", Case(FORMATS["q8_0"], 304, 4096, 290, 32))
    case = Case(FORMATS["q4_0"], 192, 2048, 70, 32, residual=False)
    check_gated(case, lambda *a: library.run_all("gated_default", *a), TOLERANCE)


@pytest.mark.parametrize("name", ["q4_0", "whole"])
@pytest.mark.parametrize("tokens", [3, 200])
def test_outlying_features_do_not_cost_the_others_their_bits(library, name, tokens):
    case = Case(FORMATS["q4_0"], 72, K, tokens, 32)
    arrays, _, _ = case.arguments()
    rng = np.random.default_rng(0)
    codes, scales, sums = arrays[:3]
    is_large = np.zeros(K, bool)
    for block in rng.choice(K // 32, 10, replace=False):  # three each, 100 times as large
        features = slice(32 * block, 32 * block + 32)
        codes[0, :, features] = codes[0, :, features] // 100
        scales[0, :, block] *= 100
        is_large[32 * block + np.array([1, 8, 30])] = True
    codes[0][:, is_large] = rng.choice([-127, 127], (tokens, is_large.sum()))
    sums[...] = -8 * codes.reshape(1, tokens, K // 32, 32).astype(np.int32).sum(-1)
    got = library.run(name, *arrays)[0]

    x = codes[0] * np.repeat(scales[0].astype(np.float64), 32, axis=1)
    exact = dequantized(case)
    unit = np.abs(x).max(axis=1, keepdims=True) / 127
    rounded = np.where(is_large, x, np.round(x / unit) * unit)
    error = got - (x @ exact.T + arrays[-3] + arrays[-2][0])
    lost = (rounded - x) @ exact.T  # by bytes of one scale for all
    assert np.sqrt((error**2).mean()) < np.sqrt((lost**2).mean()) / 4


def dequantized(case):
    """The weights `[M, K]` of a case, float64."""
    return random_matrix(np.random.default_rng(case.tokens), case.fmt, case.m, case.k)[1]


def test_activations_of_zero_leave_bias_and_residual(library):
    arrays, _, _ = Case(FORMATS["q4_1"], 72, K, 18, 32).arguments()
    for array in arrays[:3]:
        array[...] = 0
    got = library.run("q4_1", *arrays)[0]
    np.testing.assert_array_equal(got, arrays[-3] + arrays[-2][0])


def test_no_tokens(library):
    assert library.run("q4_0", *Case(FORMATS["q4_0"], 72, K, 0, 32).arguments()[0]).shape[1] == 0


def test_rows_that_steps_do_not_divide_are_left_to_others():
    assert takes(FORMATS["q4_0"], 768)
    assert not takes(FORMATS["q4_0"], 800)
    assert not takes(FORMATS["bf16"], 768)
