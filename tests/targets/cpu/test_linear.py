"""Products against float64, in every distinct storage of weights.

Tolerance: the largest |error| / Σ|x·w|. Every product rounds once and sums of K < 800 terms walk
randomly, about √K · 2^-24 = 1.6e-6 of the largest partial sum; codes stored unsigned make partial
sums up to four times larger than the result's terms, blocks and parallel chains make them smaller
again. 2e-6 holds with room, while one wrong weight among 800 shows as 1e-3.
"""

import dataclasses
import re

import numpy as np
import pytest
import tvm
from matrices import HOST, ON_CPU, build, random_matrix, tensor

from llmc.errors import CompileError
from llmc.formats import FORMATS
from llmc.targets.cpu.kernels.linear import linear
from llmc.targets.cpu.layout import pack
from llmc.targets.cpu.parameters import PARAMETERS

TOLERANCE = 2e-6
WIDE = tvm.target.codegen.target_has_features(
    "avx512f", tvm.target.Target({"kind": "llvm", "mcpu": HOST})
)
PARAMS = PARAMETERS["avx512" if WIDE else "avx2"]
# 40: half a panel and a missing one; more than two feature blocks, the last one short.
M = 40


def features(fmt):
    """Not a multiple of a word where the format allows it."""
    if fmt.sub_scales is not None:
        return 3 * fmt.sub_scales.group
    return 603 if fmt.is_float or fmt.group == 0 else 640


def key(fmt, kind):
    return f"{fmt.name}_{kind}".replace("-", "_")


def one(fmt, params=PARAMS, **options):
    options = {"bias": True, "residual": False, **options}
    return linear(fmt, M, features(fmt), 1, params=params.linear, **options)


def few(fmt, params=PARAMS):
    return linear(fmt, M, features(fmt), None, bias=True, residual=True, params=params.few)


def many(fmt, params=PARAMS):
    return linear(fmt, M, features(fmt), None, bias=False, residual=True, params=params.linear)


KINDS = {"one": one, "few": few, "many": many}


@pytest.fixture(scope="module")
def library():
    return build({key(f, name): make(f) for f in ON_CPU for name, make in KINDS.items()})


def check(function, fmt, tokens, *, m=M, k=None, bias, residual, tolerance=TOLERANCE):
    """Runs a kernel on random data and compares it with the float64 product."""
    rng = np.random.default_rng(tokens)
    k = k or features(fmt)
    matrix, exact = random_matrix(rng, fmt, m, k)
    x = rng.standard_normal((1, tokens, k)).astype(np.float32)
    extra = [rng.standard_normal(m).astype(np.float32)] if bias else []
    extra += [rng.standard_normal((1, tokens, m)).astype(np.float32)] if residual else []
    y = tensor(np.full((1, tokens, m), np.nan, np.float32))
    arguments = [tensor(a) for a in (x, *pack(fmt, [matrix]), *extra)]
    function(*arguments, y)
    expected = x[0].astype(np.float64) @ exact.T
    magnitude = np.abs(x[0].astype(np.float64)) @ np.abs(exact.T)
    for term in extra:
        expected = expected + term.reshape(-1, m)
        magnitude = magnitude + np.abs(term.reshape(-1, m))
    assert (np.abs(y.numpy()[0] - expected) <= tolerance * magnitude).all()


@pytest.mark.parametrize("fmt", ON_CPU, ids=lambda f: f.name)
def test_one_token_with_bias(library, fmt):
    check(library[key(fmt, "one")], fmt, 1, bias=True, residual=False)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("fmt", ON_CPU, ids=lambda f: f.name)
def test_a_few_tokens_with_bias_and_residual(library, fmt, tokens):
    check(library[key(fmt, "few")], fmt, tokens, bias=True, residual=True)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 33, 200])
@pytest.mark.parametrize("fmt", ON_CPU, ids=lambda f: f.name)
def test_any_number_of_tokens_with_residual(library, fmt, tokens):
    check(library[key(fmt, "many")], fmt, tokens, bias=False, residual=True)


@pytest.mark.parametrize("kind", ["few", "many"])
def test_an_empty_batch_does_nothing(library, kind):
    fmt = FORMATS["q4_1"]
    matrix, _ = random_matrix(np.random.default_rng(0), fmt, M, features(fmt))
    empty = np.zeros((1, 0, M), np.float32)
    extra = [np.zeros(M, np.float32)] if kind == "few" else []
    arguments = (np.zeros((1, 0, 640), np.float32), *pack(fmt, [matrix]), *extra, empty, empty)
    library[key(fmt, kind)](*map(tensor, arguments))


def test_shapes_from_one_weight_to_wide_and_tall_ones():
    shapes = [(1, 1), (16, 1), (1, 300), (17, 5), (100, 33), (33, 1030)]
    functions = {
        f"{kind}_{m}_{k}": linear(
            FORMATS["f32"],
            m,
            k,
            1 if kind == "one" else None,
            bias=False,
            residual=False,
            params=PARAMS.few if kind == "few" else PARAMS.linear,
        )
        for m, k in shapes
        for kind in KINDS
    }
    built = build(functions)
    for m, k in shapes:
        for kind in KINDS:
            for tokens in (1,) if kind == "one" else (1, 13):
                function = built[f"{kind}_{m}_{k}"]
                check(function, FORMATS["f32"], tokens, m=m, k=k, bias=False, residual=False)


# One of each that have the same tiles.
@pytest.mark.parametrize(
    "isa", {PARAMETERS[n].linear: n for n in sorted(PARAMETERS)[::-1]}.values()
)
def test_narrower_vectors_and_other_tiles_give_the_same(isa):
    """AVX2 code with the tiles of each instruction set: tiles change speed only."""
    params = PARAMETERS[isa]
    names = ("f32", "bf16", "f16", "w8", "q4_1") if isa == "avx2" else ("q4_1",)
    formats = [FORMATS[name] for name in names]
    built = build(
        {key(f, name): make(f, params) for f in formats for name, make in KINDS.items()},
        mcpu="x86-64-v3",
    )
    for fmt in formats:
        check(built[key(fmt, "one")], fmt, 1, bias=True, residual=False)
        check(built[key(fmt, "few")], fmt, 7, bias=True, residual=True)
        check(built[key(fmt, "many")], fmt, 33, bias=False, residual=True)


def test_no_kernel_calls_a_conversion_routine_of_the_compiler_s_library():
    """__gnu_h2f_ieee and friends cost a hundred times what an instruction does."""
    for mcpu in ("x86-64-v3", "x86-64-v4"):
        built = build({key(f, "one"): one(f) for f in map(FORMATS.get, ("f16", "bf16"))}, mcpu)
        assembly = built.mod.inspect_source("asm")
        assert "vcvtph2ps" in assembly
        # TVM puts weak definitions into every library: only calls count.
        assert not re.search(r"call\w*\s.*__(gnu_|extend|trunc)", assembly)


def test_small_products_stay_on_the_calling_thread():
    fmt = FORMATS["q4_1"]
    small = dataclasses.replace(PARAMS.linear, serial_weights=10**9)
    options = {"bias": False, "residual": False}
    serial = linear(fmt, 512, 256, 1, params=small, **options)
    parallel = linear(fmt, 512, 512, 1, params=PARAMS.linear, **options)
    assert "T.parallel" not in serial.script()
    assert "T.parallel" in parallel.script()


def test_a_group_that_does_not_divide_the_features_is_refused():
    with pytest.raises(CompileError, match="group 128 does not divide 576"):
        linear(FORMATS["w4-g128"], 16, 576, 1, bias=False, residual=False, params=PARAMS.linear)
