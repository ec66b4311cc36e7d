"""Products in matrix registers (AMX) against float64.

The object code that is shipped runs: on the processor where that has such registers, and otherwise
with its tile instructions emulated (see emulated_tiles.py).
"""

from __future__ import annotations

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import tvm
from emulated_tiles import Library, needs_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_products import AFFINE, TOLERANCE, Case, check_gated, quantized_gate
from tvm import relax

from llmc import dialect
from llmc.formats import FORMATS
from llmc.targets.base import Site
from llmc.targets.cpu.kernels import amx
from llmc.targets.cpu.kernels.bfloat16_linear import bfloat16_linear
from llmc.targets.cpu.kernels.code_tiles import takes
from llmc.targets.cpu.kernels.integer import activation_block
from llmc.targets.cpu.kernels.integer_linear import integer_linear
from llmc.targets.cpu.kernels.nested_tiles import takes_nested
from llmc.targets.cpu.layout import pack
from llmc.targets.cpu.parameters import (
    PARAMETERS,
    CodeTileParameters,
    FewTileParameters,
    NestedTileParameters,
    TileParameters,
    Tiling,
)
from llmc.targets.cpu.target import CpuTarget

# Row blocks of 32 rows, columns of four panels and four chunks of features: several of each.
TILES = TileParameters(crossover=8, rows=32, panels=4, min_columns=1, steps=7)
VECTORS = Tiling(panels=1, token_tiles=(1,))  # which are tested elsewhere, and quickly compiled
INTEGER = replace(
    PARAMETERS["amx"].integer,
    tiles=TILES,
    byte_tiles=None,
    code_tiles=None,
    nested_tiles=None,
    tiling=VECTORS,
    composed=None,
)
# Tasks of two panels and of one; every number of rows.
CODE_TILES = CodeTileParameters(first=1, last=40, panels=2, min_columns=1)
CODES = replace(INTEGER, code_tiles=CODE_TILES)
# Tasks of four panels and of one; what is asked for ahead is in this super-block, or two later.
NESTED = replace(
    INTEGER, nested_tiles=NestedTileParameters(first=1, last=40, panels=4, min_columns=1, ahead=9)
)
ONE_STREAM = replace(CODES, code_tiles=replace(CODE_TILES, streams=1))
# Up to sixteen rows in tasks of two rounds of four panels, more of them in blocks.
BFLOAT16 = replace(
    PARAMETERS["amx"].bfloat16,
    tiles=replace(TILES, crossover=16),
    few_tiles=FewTileParameters(first=4, panels=8, min_columns=1),
    tiling=VECTORS,
)

K = 768
SHAPES = {"odd": 72, "even": 64, "one": 9}  # rows of weights: five panels, four, half a one
# A block of several groups, a unit of several steps, and one that no full step divides.
BLOCKS = {"wide": ("q4_1", 128), "long": ("w8", 384), "short": ("w8", 96)}
CODE_BLOCKS = {"two": ("q4_1", 64), "long": BLOCKS["long"], "short": BLOCKS["short"]}
# Gated products: tasks of one block of outputs and, in the last, half as many panels or fewer.
GATED = {
    "gated_scaled": ("q4_0", 192, replace(INTEGER, tiles=replace(TILES, panels=8))),
    "gated_codes": ("q4_1", 192, replace(CODES, code_tiles=replace(CODE_TILES, panels=8))),
    "gated_nested": ("q6_k", 192, NESTED),
    "gated_wide": ("w4-g64-asym", 256, INTEGER),
}
BF16_TOLERANCE = 1e-6
INTEGER_TOLERANCE = 4e-4
"""Of Σ|x·w|: both factors are rounded to 8 bits, by 2^-9 of each at most, in random directions; the
most seen is 2e-4. One wrong code of 768 shows as 1e-3.
"""

NESTED_TOLERANCE = 5e-5
"""Activations are rounded to 16 bits by the largest of 256, and 2^-16 of the largest products are
left out but for their mean: over 1 to 40 tokens, that adds up to 3.4e-5 where a row is one
super-block and to 1.6e-5 where it is three. One wrong code of 256 shows as 2e-4.
"""

pytestmark = needs_vectors
# Features of a row whose units make four streams, two and one, many and few.
FEATURES = (768, 576, 288, 96, 32)


def key(fmt):
    return fmt.name.replace("-", "_")


def integer(fmt, m, block, params=INTEGER, k=K):
    return integer_linear(fmt, m, k, None, block=block, bias=True, residual=True, params=params)


def gated(fmt, m, params):
    gate = quantized_gate(FORMATS[fmt], m, "silu")
    block = activation_block(FORMATS[fmt], K, 32)
    return integer_linear(
        FORMATS[fmt], m, K, None, block=block, bias=True, residual=False, params=params, gate=gate
    )


def bfloat16(m, k, params=BFLOAT16):
    return bfloat16_linear(m, k, None, bias=True, residual=True, params=params)


def functions():
    made = {key(f): integer(f, 72, activation_block(f, K, 32)) for f in AFFINE}
    made |= {n: integer(FORMATS[f], 40, block) for n, (f, block) in BLOCKS.items()}
    made |= {f"codes_{key(f)}": integer(f, 72, activation_block(f, K, 32), CODES) for f in AFFINE}
    made |= {
        f"codes_{n}": integer(FORMATS[f], 40, block, CODES) for n, (f, block) in CODE_BLOCKS.items()
    }
    made |= {f"codes_{k}": integer(FORMATS["q4_1"], 72, 32, CODES, k) for k in FEATURES}
    made |= {f"nested_{k}": integer(FORMATS["q6_k"], 72, 32, NESTED, k) for k in (256, K)}
    made |= {"nested_block": integer(FORMATS["q6_k"], 64, 128, NESTED)}
    made |= {"codes_one_stream": integer(FORMATS["q6_k"], 72, 32, ONE_STREAM)}
    made |= {n: gated(*GATED[n]) for n in GATED}
    made |= {f"rows_{n}": integer(FORMATS["q4_0"], m, 32) for n, m in SHAPES.items()}
    return made | {f"bfloat16_{n}": bfloat16(m, K - 16) for n, m in SHAPES.items()}


@pytest.fixture(scope="module")
def library():
    return Library(functions())


@pytest.fixture(scope="module")
def emulated():
    library = Library({"f": integer(FORMATS["q4_0"], 72, 32)})
    if library.emulator is None:
        pytest.skip("this CPU has matrix registers")
    return library


def check_integer(library, name, fmt, m, block, tokens):
    case = Case(fmt, m, K, tokens, block)
    tolerance = INTEGER_TOLERANCE if tokens > TILES.crossover else TOLERANCE
    case.check(lambda *arrays: library.run(name, *arrays), tolerance)


def rows_of(tokens):
    """Arguments of the kernel that `emulated` holds."""
    return Case(FORMATS["q4_0"], 72, K, tokens, 32).arguments()[0]


@pytest.mark.parametrize("fmt", AFFINE, ids=lambda f: f.name)
@settings(max_examples=5, deadline=None)
@given(tokens=st.integers(0, 80))
def test_integer_products_in_every_format(library, fmt, tokens):
    check_integer(library, key(fmt), fmt, 72, activation_block(fmt, K, 32), tokens)


@pytest.mark.parametrize("fmt", AFFINE, ids=lambda f: f.name)
@settings(max_examples=5, deadline=None)
@given(tokens=st.integers(1, 40))
def test_codes_in_every_format(library, fmt, tokens):
    case = Case(fmt, 72, K, tokens, activation_block(fmt, K, 32))
    case.check(lambda *arrays: library.run(f"codes_{key(fmt)}", *arrays), TOLERANCE)


@pytest.mark.parametrize("fmt", AFFINE, ids=lambda f: f.name)
def test_codes_at_the_ends_of_their_ranges(library, fmt):
    case = Case(fmt, 72, K, 9, activation_block(fmt, K, 32), extreme=True)
    case.check(lambda *arrays: library.run(f"codes_{key(fmt)}", *arrays), TOLERANCE)


@pytest.mark.parametrize("name", GATED)
@settings(max_examples=5, deadline=None)
@given(tokens=st.integers(1, 80))
def test_gated_products(library, name, tokens):
    fmt, m, _ = GATED[name]
    case = Case(FORMATS[fmt], m, K, tokens, activation_block(FORMATS[fmt], K, 32), residual=False)
    check_gated(case, lambda *a: library.run_all(name, *a), INTEGER_TOLERANCE)


@pytest.mark.parametrize("k", [256, K])
@settings(max_examples=5, deadline=None)
@given(tokens=st.integers(1, 40))
def test_codes_times_sub_scales(library, k, tokens):
    case = Case(FORMATS["q6_k"], 72, k, tokens, 32)
    case.check(lambda *arrays: library.run(f"nested_{k}", *arrays), NESTED_TOLERANCE)


def test_codes_times_sub_scales_at_the_ends_of_their_ranges(library):
    case = Case(FORMATS["q6_k"], 72, K, 16, 32, extreme=True)
    case.check(lambda *arrays: library.run(f"nested_{K}", *arrays), NESTED_TOLERANCE)


def test_codes_times_sub_scales_in_larger_blocks(library):
    case = Case(FORMATS["q6_k"], 64, K, 16, 128)
    case.check(lambda *arrays: library.run("nested_block", *arrays), NESTED_TOLERANCE)


def test_blocks_without_activations_add_nothing_to_nested_products(library):
    case = Case(FORMATS["q6_k"], 72, K, 5, 32)
    arrays, _, _ = case.arguments()
    arrays[0][:] = 0
    arrays[1][:, :, :16] = 0  # scales of two super-blocks
    bias, residual = arrays[-3:-1]
    np.testing.assert_array_equal(library.run(f"nested_{K}", *arrays)[0], residual[0] + bias)


def test_which_products_have_whole_weights_for_nested_tiles():
    assert takes_nested(FORMATS["q6_k"], 32)
    assert not takes_nested(FORMATS["q6_k"], 96)  # super-blocks share no scale of activations
    assert not takes_nested(FORMATS["q3_k"], 32)
    assert not takes_nested(FORMATS["q4_k"], 32)
    assert not takes_nested(FORMATS["q8_0"], 32)


def test_blocks_of_many_groups_have_no_tile_for_each():
    assert takes(FORMATS["q6_k"], 32)
    assert not takes(FORMATS["q6_k"], 64)
    assert not takes(FORMATS["q4_0"], 128)
    assert not takes(FORMATS["f16"], 32)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33, 40])
def test_codes_in_every_number_of_tiles(library, tokens):
    case = Case(FORMATS["q4_1"], 72, K, tokens, 32)
    case.check(lambda *arrays: library.run("codes_q4_1", *arrays), TOLERANCE)


@pytest.mark.parametrize("k", FEATURES)
def test_codes_in_rows_of_every_number_of_units(library, k):
    case = Case(FORMATS["q4_1"], 72, k, 11, 32)
    case.check(lambda *arrays: library.run(f"codes_{k}", *arrays), TOLERANCE)


def test_codes_in_two_planes_are_read_in_one_stream_at_least(library):
    case = Case(FORMATS["q6_k"], 72, K, 11, 32)
    case.check(lambda *arrays: library.run("codes_one_stream", *arrays), TOLERANCE)


@pytest.mark.parametrize("name", CODE_BLOCKS)
def test_codes_in_blocks_of_other_sizes(library, name):
    fmt, block = CODE_BLOCKS[name]
    case = Case(FORMATS[fmt], 40, K, 13, block)
    case.check(lambda *arrays: library.run(f"codes_{name}", *arrays), TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
# A rest of each kind behind none, one and two row blocks; 8 is the last that vectors take.
@pytest.mark.parametrize("tokens", [8, 9, 16, 17, 31, 32, 33, 48, 49, 64, 65, 95])
def test_every_number_of_tiles(library, shape, tokens):
    check_integer(library, f"rows_{shape}", FORMATS["q4_0"], SHAPES[shape], 32, tokens)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_other_sizes(library, name):
    fmt, block = BLOCKS[name]
    check_integer(library, name, FORMATS[fmt], 40, block, 27)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(0, 80))
def test_bfloat16_products(library, shape, tokens):
    m, k = SHAPES[shape], K - 16  # of which no full step of 32 is a divisor
    rng = np.random.default_rng(tokens)
    weights = rng.standard_normal((m, k)).astype(ml_dtypes.bfloat16)
    x = rng.standard_normal((1, tokens, k)).astype(ml_dtypes.bfloat16)
    bias = rng.standard_normal(m).astype(np.float32)
    residual = rng.standard_normal((1, tokens, m)).astype(np.float32)
    y = np.full((1, tokens, m), np.nan, np.float32)
    arrays = (x.view(np.uint16), *pack(FORMATS["bf16"], [weights]), bias, residual, y)
    got = library.run(f"bfloat16_{shape}", *arrays)[0]
    exact, factors = weights.astype(np.float64), x[0].astype(np.float64)
    magnitude = np.abs(factors) @ np.abs(exact.T) + 1
    error = np.abs(got - (factors @ exact.T + bias + residual[0]))
    assert (error <= BF16_TOLERANCE * magnitude).all()


def test_few_tokens_use_no_tiles(emulated):
    counts = []
    for tokens in (8, 9, 33):
        before = emulated.emulator.products
        emulated.run("f", *rows_of(tokens))
        counts.append(emulated.emulator.products - before)
    steps, panels = K // 32, 5
    assert counts == [0, steps * panels, 3 * steps * panels]


def test_misused_tiles_are_noticed(emulated, monkeypatch):
    """What the other tests rely on: weights of half the activations' depth do not fit them."""
    monkeypatch.setattr(amx, "ceildiv", lambda depth, part: depth // part // 2)
    wrong = Library({"f": integer(FORMATS["q4_0"], 72, 32)})
    with pytest.raises(AssertionError):
        wrong.run("f", *rows_of(9))


def test_a_product_takes_the_same_numbers_in_every_tiling(library):
    """Chunks and row blocks change the order of sums, nothing else."""
    arguments = Case(FORMATS["q4_0"], 72, K, 80, 32).arguments()[0]
    default = replace(PARAMETERS["amx"].integer, byte_tiles=None)
    whole = Library({"f": integer(FORMATS["q4_0"], 72, 32, default)})
    got, expected = library.run("q4_0", *arguments), whole.run("f", *arguments)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_level_compiles_to_instructions_on_tiles():
    target = CpuTarget("amx")
    functions = {
        "integer": integer(FORMATS["q4_0"], 64, 32),
        "bfloat16": bfloat16(64, K),
    }
    for func in functions.values():
        module = tvm.IRModule({"f": func.with_attr("global_symbol", "f")})
        with tvm.transform.PassContext(**target.pass_options):
            assembly = tvm.compile(module, target=target.tvm_target).mod.inspect_source("asm")
        loads, stores = ("tileloadd", "tileloaddt1"), ("tilestored", "tilerelease")
        for name in ("ldtilecfg", *loads, "tdpbf16ps", *stores):
            assert re.search(rf"^\s+{name}\b", assembly, re.MULTILINE), name


def test_entry_points_for_a_few_tokens_hold_no_tile_code():
    [rule] = [r for name, r in CpuTarget("amx").kernel_rules if name == "cpu.integer"]
    op = dialect.IntegerLinear(format="q4_0", block=32)
    shapes = {"codes": ("int8", K), "scales": ("float32", K // 32), "sums": ("int32", K // 32)}
    n = tvm.tirx.Var("n", "int64")
    types = {name: relax.TensorType([1, n, k], dtype) for name, (dtype, k) in shapes.items()}
    types["weight"] = relax.TensorType([4096, K], "float32")
    site = Site(op=op, types=types, max_tokens=8, tokens=None, num_groups=1, page_size=16)
    assert "tile" not in rule(site).func.script()
    assert "tile" in rule(replace(site, max_tokens=9)).func.script()


def test_what_tiles_fill_is_as_large_as_tiles():
    """TVM cuts a buffer down to what it sees used: rows that tokens read, and not what tiles do."""
    few = replace(BFLOAT16, tiles=None)
    module = tvm.IRModule({"f": bfloat16(64, K, few).with_attr("global_symbol", "f")})
    target = CpuTarget("amx")
    with tvm.transform.PassContext(**target.pass_options):
        code = tvm.compile(module, target=target.tvm_target).mod.inspect_source("ll")
    sizes = re.findall(r"call ptr %\w+\(i32 1, i32 %dev_id, i64 ([^,]+)", code)
    assert sorted(map(int, sizes)) == sorted([4 * 16 * 64, K // 32 * 16 * 64])
