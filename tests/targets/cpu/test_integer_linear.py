"""Integer products on every instruction set that runs here, and quantized activations."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from arm_library import QEMU, ArmLibrary
from host_library import HostLibrary
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_products import AFFINE, Case, check_gated, quantized_gate
from matrices import build, tensor

from llmc.formats import FORMATS
from llmc.targets.cpu.kernels.integer import activation_block
from llmc.targets.cpu.kernels.integer_linear import integer_linear
from llmc.targets.cpu.kernels.quantize_activations import quantize_activations
from llmc.targets.cpu.parameters import PARAMETERS

M, K = 72, 768  # four panels and a half; three super-blocks
FEW = [FORMATS[n] for n in ("w8", "q4_0", "q4_1", "q5_1", "q2_k", "iq4_nl")]
FORMATS_OF = {"avx512vnni": AFFINE, "avx512": FEW, "avxvnni": FEW, "avx2": FEW}
# Level -> an instruction that its kernels are made of.
INSTRUCTIONS = {
    "avx512vnni": "vpdpbusd",
    "avx512": "vpmaddubsw",
    "avxvnni": "vpdpbusd",
    "avx2": "vpmaddubsw",
    "neon-dotprod": "sdot",
}


# Blocks of two panels and of eight; codes in planes.
GATED = ("q4_0", "w4-g128", "q4_k")
GATED_ROWS = 512


def key(fmt, kind):
    return f"{fmt.name}_{kind}".replace("-", "_")


def product(fmt, tokens, level, **options):
    params = replace(PARAMETERS[level].integer, **options.pop("params", {}))
    block = activation_block(fmt, K, options.pop("block", params.block))
    options = {"bias": True, "residual": tokens is None, **options}
    m = options.pop("m", M)
    return integer_linear(fmt, m, K, tokens, block=block, params=params, **options)


def products(level, formats):
    return {
        key(fmt, kind): product(fmt, tokens, level)
        for fmt in formats
        for kind, tokens in (("one", 1), ("many", None))
    }


@cache
def library_of(level):
    functions = products(level, FORMATS_OF[level])
    functions["chunks"] = product(
        FORMATS["q5_1"], None, level, params={"chunk": 128, "chunk_rows": 16}
    )
    functions["wide"] = product(FORMATS["q4_1"], None, level, block=128)
    for name in GATED:
        for kind, tokens in (("one", 1), ("many", None)):
            gate = quantized_gate(FORMATS[name], GATED_ROWS, "silu")
            functions[f"gated_{key(FORMATS[name], kind)}"] = product(
                FORMATS[name], tokens, level, m=GATED_ROWS, residual=False, gate=gate
            )
    return HostLibrary(functions, level)


def each(formats_of):
    """Every level with each of its formats."""
    cases = [(level, fmt) for level, formats in formats_of.items() for fmt in formats]
    ids = [f"{level}-{fmt.name}" for level, fmt in cases]
    return pytest.mark.parametrize(("level", "fmt"), cases, ids=ids)


every_level = pytest.mark.parametrize("level", FORMATS_OF)


def check(library, fmt, kind, tokens, **options):
    block = activation_block(fmt, K, options.pop("block", 32))
    case = Case(fmt, M, K, tokens, block, residual=kind != "one", **options)
    name = kind if kind in ("wide", "chunks") else key(fmt, kind)
    case.check(lambda *arrays: library.run(name, *arrays))


@each(FORMATS_OF)
def test_one_token(level, fmt):
    check(library_of(level), fmt, "one", 1)


@each(FORMATS_OF)
@settings(max_examples=8, deadline=None)
@given(tokens=st.integers(0, 40))
def test_any_number_of_tokens(level, fmt, tokens):
    check(library_of(level), fmt, "many", tokens)


@each(dict.fromkeys(FORMATS_OF, FEW))
def test_the_largest_codes_of_both_signs_do_not_overflow(level, fmt):
    """Sums of 16 bits saturate at 2 · 128 · 127 and little more."""
    for tokens in (1, 13):
        check(library_of(level), fmt, "many", tokens, extreme=True)


@every_level
def test_several_groups_of_weights_share_a_scale_of_activations(level):
    check(library_of(level), FORMATS["q4_1"], "wide", 7, block=128)


@every_level
@pytest.mark.parametrize("tokens", [8, 9, 16, 17, 40])
def test_many_rows_are_multiplied_by_chunks_some_at_a_time(level, tokens):
    check(library_of(level), FORMATS["q5_1"], "chunks", tokens)


@every_level
@pytest.mark.parametrize("name", GATED)
def test_gated_outputs(level, name):
    fmt = FORMATS[name]
    for kind, tokens in (("one", 1), ("many", 0), ("many", 5), ("many", 40)):
        case = Case(fmt, GATED_ROWS, K, tokens, activation_block(fmt, K, 32), residual=False)
        function = f"gated_{key(fmt, kind)}"
        check_gated(case, lambda *a, f=function: library_of(level).run_all(f, *a))


@every_level
def test_each_level_is_made_of_its_instruction(level):
    assert INSTRUCTIONS[level] in library_of(level).assembly


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    if QEMU is None:
        pytest.skip("no qemu-aarch64 here")
    formats = [FORMATS[n] for n in ("w8", "q4_1", "q5_1", "iq4_nl")]
    return ArmLibrary(
        products("neon-dotprod", formats), tmp_path_factory.mktemp("arm"), "neon-dotprod"
    )


@pytest.mark.parametrize("name", ["w8", "q4_1", "q5_1", "iq4_nl"])
def test_arm_in_an_emulator(arm, name):
    for tokens in (1, 11):
        check(arm, FORMATS[name], "many", tokens)
        check(arm, FORMATS[name], "many", tokens, extreme=True)
    check(arm, FORMATS[name], "one", 1)
    assert INSTRUCTIONS["neon-dotprod"] in arm.assembly


def quantized(features, block, unit):
    return quantize_activations(features=features, block=block, unit=unit, factor=-8)


@pytest.mark.parametrize(("block", "unit"), [(32, 16), (128, 32)], ids=["fine", "coarse"])
def test_activations_are_rounded_to_the_nearest_of_255_steps(block, unit):
    quantize = build({"quantize": quantized(K, block, unit)})["quantize"]
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, 5, K)).astype(np.float32) * 10
    x[0, 1, :block] = 0  # a block of nothing has scale zero, not a division by it
    codes = tensor(np.full(x.shape, 99, np.int8))
    scales = tensor(np.full((1, 5, K // block), np.nan, np.float32))
    sums = tensor(np.zeros((1, 5, K // unit), np.int32))
    quantize(tensor(x), codes, scales, sums)
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
