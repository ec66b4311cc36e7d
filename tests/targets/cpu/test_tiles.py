"""Products in matrix registers (AMX): against float64, and against the vector kernels.

The object code that is shipped runs: on the processor where that has such registers, and otherwise
with its tile instructions emulated (see emulated_tiles.py). Tolerances are those of
integer_products.py and test_bfloat16_linear.py, for their reasons.
"""

from __future__ import annotations

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import tvm
from emulated_tiles import Emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_products import AFFINE, Case
from matrices import build, tensor
from tvm import relax

from llmc import dialect
from llmc.cpu_features import host_features, withheld_features
from llmc.formats import FORMATS
from llmc.targets.base import Site
from llmc.targets.cpu.kernels import amx
from llmc.targets.cpu.kernels.bfloat16_linear import bfloat16_linear
from llmc.targets.cpu.kernels.integer import activation_block
from llmc.targets.cpu.kernels.integer_linear import integer_linear
from llmc.targets.cpu.layout import pack
from llmc.targets.cpu.parameters import PARAMETERS, TileParameters, Tiling
from llmc.targets.cpu.target import ISA_LEVELS, CpuTarget

LEVEL = ISA_LEVELS["amx"]
BELOW = ISA_LEVELS["avx512bf16"]
# A row block of 32 rows and no more: several of them, with and without a rest.
TILES = TileParameters(row_block_bytes=1)
VECTORS = Tiling(panels=1, token_tiles=(1,))  # which are tested elsewhere, and quickly compiled
INTEGER = replace(PARAMETERS["amx"].integer, tiles=TILES, tiling=VECTORS)
BFLOAT16 = replace(PARAMETERS["amx"].bfloat16, tiles=TILES, tiling=VECTORS)

K = 768
SHAPES = {"odd": 72, "even": 64, "one": 9}  # rows of weights: five panels, four, half a one
# A block of several groups, a unit of several steps, and one that no full step divides.
BLOCKS = {"wide": ("q4_1", 128), "long": ("w8", 384), "short": ("w8", 96)}
BF16_TOLERANCE = 1e-6

pytestmark = pytest.mark.skipif(
    not host_features().issuperset(BELOW.features), reason="this CPU has no AVX-512 BF16"
)


def key(fmt):
    return fmt.name.replace("-", "_")


def integer(fmt, m, block, params=INTEGER):
    return integer_linear(fmt, m, K, None, block=block, bias=True, residual=True, params=params)


def bfloat16(m, k, params=BFLOAT16):
    return bfloat16_linear(m, k, None, bias=True, residual=True, params=params)


def functions():
    made = {key(f): integer(f, 72, activation_block(f, K, 32)) for f in AFFINE}
    made |= {n: integer(FORMATS[f], 40, block) for n, (f, block) in BLOCKS.items()}
    made |= {f"rows_{n}": integer(FORMATS["q4_0"], m, 32) for n, m in SHAPES.items()}
    return made | {f"bfloat16_{n}": bfloat16(m, K - 16) for n, m in SHAPES.items()}


class Library:
    """Kernels as they are shipped; `emulator` where the processor has no matrix registers."""

    def __init__(self, functions):
        if withheld_features():
            pytest.skip("the system refuses the matrix registers, and nothing is left to emulate")
        named = {n: f.with_attr("global_symbol", n) for n, f in functions.items()}
        has_tiles = host_features().issuperset(LEVEL.features)
        self.emulator = None if has_tiles else Emulator()
        target = CpuTarget("amx")
        with tvm.transform.PassContext(config=target.pass_config):
            self.module = tvm.compile(tvm.IRModule(named), target=target.tvm_target)

    def run(self, name, *arrays):
        if self.emulator is not None:
            return self.emulator.run(self.module[name], *arrays)
        tensors = [tensor(a) for a in arrays]
        self.module[name](*tensors)
        return tensors[-1].numpy()


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
    Case(fmt, m, K, tokens, block).check(lambda *arrays: library.run(name, *arrays))


def rows_of(tokens):
    """Arguments of the kernel that `emulated` holds."""
    return Case(FORMATS["q4_0"], 72, K, tokens, 32).arguments()[0]


@pytest.mark.parametrize("fmt", AFFINE, ids=lambda f: f.name)
@settings(max_examples=5, deadline=None)
@given(tokens=st.integers(0, 80))
def test_integer_products_in_every_format(library, fmt, tokens):
    check_integer(library, key(fmt), fmt, 72, activation_block(fmt, K, 32), tokens)


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


def test_tiles_round_as_vectors_do(library):
    """The same sums of codes enter the same operations, of which the compiler fuses a few
    differently: the last bit of numbers below 32 may change.
    """
    formats = [FORMATS[n] for n in ("w8", "q4_1", "q4_0")]
    vectors = {key(f): integer(f, 72, 32, replace(INTEGER, tiles=None)) for f in formats}
    built = build(vectors)
    for fmt in formats:
        arguments, _, _ = Case(fmt, 72, K, 40, 32).arguments()
        y = tensor(arguments[-1])
        built[key(fmt)](*map(tensor, arguments[:-1]), y)
        got = library.run(key(fmt), *arguments)
        np.testing.assert_allclose(got, y.numpy(), rtol=1e-6, atol=2e-6)


def test_few_tokens_use_no_tiles(emulated):
    counts = []
    for tokens in (8, 9, 33):
        before = emulated.emulator.products
        emulated.run("f", *rows_of(tokens))
        counts.append(emulated.emulator.products - before)
    units, panels = K // 32, 5
    assert counts == [0, units * panels, 3 * units * panels]


def test_misused_tiles_are_noticed(emulated, monkeypatch):
    """What the other tests rely on: full tiles for nine rows of activations read past their end."""
    monkeypatch.setattr(amx, "_configure", wrong_rows(amx._configure))
    wrong = Library({"f": integer(FORMATS["q4_0"], 72, 32)})
    with pytest.raises(AssertionError, match=r"tileloadd.*guard"):
        wrong.run("f", *rows_of(9))


def wrong_rows(configure):
    return lambda line, _, depth: configure(line, tvm.tirx.IntImm("int32", 16), depth)


def test_the_level_compiles_to_instructions_on_tiles():
    target = CpuTarget("amx")
    functions = {
        "tdpbssd": integer(FORMATS["q4_0"], 64, 32),
        "tdpbsud": integer(FORMATS["q4_1"], 64, 32),
        "tdpbf16ps": bfloat16(64, K),
    }
    for instruction, func in functions.items():
        module = tvm.IRModule({"f": func.with_attr("global_symbol", "f")})
        with tvm.transform.PassContext(config=target.pass_config):
            assembly = tvm.compile(module, target=target.tvm_target).mod.inspect_source("asm")
        for name in ("ldtilecfg", "tileloadd", instruction, "tilestored", "tilerelease"):
            assert re.search(rf"^\s+{name}\b", assembly, re.MULTILINE), name


def test_entry_points_for_a_few_tokens_hold_no_tile_code():
    [rule] = [r for name, r in CpuTarget("amx").kernel_rules if name == "cpu.integer"]
    op = dialect.IntegerLinear(format="q4_0", block=32)
    shapes = {"codes": ("int8", K), "scales": ("float32", K // 32), "sums": ("int32", K // 32)}
    n = tvm.tirx.Var("n", "int64")
    types = {name: relax.TensorType([1, n, k], dtype) for name, (dtype, k) in shapes.items()}
    types["weight"] = relax.TensorType([64, K], "float32")
    site = Site(op=op, types=types, max_tokens=8, tokens=None, num_groups=1, page_size=16)
    assert "tile" not in rule(site).func.script()
    assert "tile" in rule(replace(site, max_tokens=9)).func.script()
