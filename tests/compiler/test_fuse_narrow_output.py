"""Which norms and gated products hand their outputs on narrow."""

from functools import partial

import pytest
from graphs import T, assert_idempotent, assert_unchanged, graph
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.fuse_narrow_output import fuse_narrow_output
from llmc.compiler.rewriter import bindings

PARAMS = {"x": [1, T, 64], "w": [128, 64], "b": [128], "r": [1, T, 128]}
NORM = dialect.RmsNorm(eps=1e-5, offset=1.0)
QUANTIZE = dialect.QuantizeActivations(block=32, unit=16, factor=-8)


def apply(mod):
    return fuse_narrow_output(mod, 16)


def items(emit, parts):
    parts = emit(parts)
    return [emit(relax.TupleGetItem(parts, i)) for i in range(3)]


def integer(emit, x, w, b, r, *, residual=False, read_twice=False):
    coded = dialect.QuantizeActivations(block=32, unit=32, factor=1)
    out = relax.TensorType([1, T, 128], "float32")
    product = dialect.IntegerLinear(format="q4_0", block=32)
    product = emit(product.emit(out, *items(emit, coded.call(x)), w, b, r if residual else None))
    gated = emit(dialect.GatedActivation(kind="gelu").call(product))
    _, scales, _ = items(emit, QUANTIZE.call(gated))
    return relax.op.add(scales, relax.op.sum(gated)) if read_twice else scales


def bfloat16(emit, x, w, b, r):
    rounded = emit(dialect.RoundActivations().call(x))
    out = relax.TensorType([1, T, 128], "float32")
    product = emit(dialect.Bfloat16Linear().emit(out, rounded, w, b, None))
    gated = emit(dialect.GatedActivation(kind="silu").call(product))
    return dialect.RoundActivations().call(gated)


def operators(mod):
    found = [dialect.match_any(b.value) for b in bindings(mod["main"])]
    return [(match.op, sorted(match.operands)) for match in found if match is not None]


def test_codes_come_straight_from_the_product():
    mod = apply(graph(integer, **PARAMS))
    fused = dialect.GatedIntegerLinear(
        format="q4_0", block=32, kind="gelu", out_block=32, out_unit=16, out_factor=-8
    )
    assert operators(mod)[1:] == [(fused, ["bias", "codes", "scales", "sums", "weight"])]
    assert_idempotent(apply, mod)


def test_bfloat16_likewise():
    mod = apply(graph(bfloat16, **PARAMS))
    fused = dialect.GatedBfloat16Linear(kind="silu")
    assert operators(mod)[1:] == [(fused, ["bias", "weight", "x"])]


@pytest.mark.parametrize("option", ["residual", "read_twice"])
def test_a_residual_or_another_reader_keeps_them_apart(option):
    assert_unchanged(apply, graph(partial(integer, **{option: True}), **PARAMS))


def test_norms_are_narrowed_at_once():
    def quantized(emit, x, g):
        return items(emit, QUANTIZE.call(emit(NORM.call(x, g))))[1]

    def rounded(emit, x, g):
        return dialect.RoundActivations().call(emit(NORM.call(x, g)))

    params = {"x": [1, T, 64], "g": [64]}
    fused = dialect.QuantizedRmsNorm(eps=1e-5, offset=1.0, block=32, unit=16, factor=-8)
    assert operators(apply(graph(quantized, **params))) == [(fused, ["weight", "x"])]
    fused = dialect.RoundedRmsNorm(eps=1e-5, offset=1.0)
    assert operators(apply(graph(rounded, **params))) == [(fused, ["weight", "x"])]


def test_halves_that_are_no_whole_panels_are_left_alone():
    assert_unchanged(lambda mod: fuse_narrow_output(mod, 48), graph(integer, **PARAMS))
