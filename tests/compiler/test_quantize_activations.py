"""Which products take their activations in bytes, and that siblings share them."""

import pytest
from graphs import T, assert_idempotent, assert_unchanged, graph
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.quantize_activations import quantize_activations, round_activations
from llmc.compiler.rewriter import bindings
from llmc.compiler.schemes import scheme_of
from llmc.errors import UnsupportedError
from llmc.targets.base import ActivationBlocks

X = [1, T, 64]


def blocks(fmt, features):
    if fmt.is_float:
        return None
    return ActivationBlocks(block=32, unit=min(fmt.group or 32, 32), factor=-8)


def apply(mod):
    return quantize_activations(mod, blocks)


def operators(mod):
    found = [dialect.match_any(b.value) for b in bindings(mod["main"])]
    return [match.op for match in found if match is not None]


def test_a_product_takes_codes_scales_and_sums_and_keeps_its_epilogue():
    linear = dialect.Linear(format="q4_0")
    mod = apply(
        graph(
            lambda emit, x, w, b, r: linear.call(x, w, b, r), x=X, w=[16, 64], b=[16], r=[1, T, 16]
        )
    )
    coded, product = operators(mod)
    assert coded == dialect.QuantizeActivations(block=32, unit=32, factor=-8)
    assert product == dialect.IntegerLinear(format="q4_0", block=32)
    [call] = [b.value for b in bindings(mod["main"]) if dialect.IntegerLinear.match(b.value)]
    _, operands = dialect.IntegerLinear.match(call)
    assert [str(operands[n].ty.dtype) for n in ("codes", "scales", "sums")] == [
        *("int8", "float32", "int32")
    ]
    assert [operands[n].name for n in ("weight", "bias", "residual")] == ["w", "b", "r"]
    assert_idempotent(apply, mod)


def test_float_formats_keep_float_activations():
    linear = dialect.Linear(format="f32")
    assert_unchanged(apply, graph(lambda emit, x, w: linear.call(x, w), x=X, w=[16, 64]))


def test_products_of_one_input_share_its_codes():
    first, second = dialect.Linear(format="q4_0"), dialect.Linear(format="q8_0")

    def body(emit, x, w, v):
        return relax.op.add(emit(first.call(x, w)), emit(second.call(x, v)))

    mod = apply(graph(body, x=X, w=[16, 64], v=[16, 64]))
    mod = relax.transform.EliminateCommonSubexpr()(mod)
    kinds = [type(op) for op in operators(mod)]
    assert kinds.count(dialect.QuantizeActivations) == 1
    assert kinds.count(dialect.IntegerLinear) == 2


def test_experts_take_codes_of_their_rows():
    experts = dialect.GroupedLinear(format="q4_0")
    mod = apply(
        graph(
            lambda emit, x, w, ids: experts.call(x, w, None, ids),
            x=[T, 64],
            w=[4, 16, 64],
            ids=([T, 2], "int32"),
        )
    )
    coded, product = operators(mod)
    assert coded == dialect.QuantizeActivations(block=32, unit=32, factor=-8)
    assert product == dialect.IntegerGroupedLinear(format="q4_0", block=32)
    [call] = [b.value for b in bindings(mod["main"]) if dialect.IntegerGroupedLinear.match(b.value)]
    _, operands = dialect.IntegerGroupedLinear.match(call)
    assert [int(operands["codes"].ty.shape[i]) for i in (0, 2)] == [1, 64]
    assert operands["expert_ids"].name == "ids"
    assert_idempotent(apply, mod)


def test_bfloat16_weights_take_bfloat16_activations():
    linear = dialect.Linear(format="bf16")
    mod = round_activations(
        graph(lambda emit, x, w, r: linear.call(x, w, None, r), x=X, w=[16, 64], r=[1, T, 16])
    )
    assert operators(mod) == [dialect.RoundActivations(), dialect.Bfloat16Linear()]
    assert_idempotent(round_activations, mod)


def test_an_odd_number_of_features_has_no_pairs():
    linear = dialect.Linear(format="bf16")
    odd = graph(lambda emit, x, w: linear.call(x, w), x=[1, T, 63], w=[16, 63])
    assert_unchanged(round_activations, odd)


@pytest.mark.parametrize("name", ["w8a8", "w4a8-g32", "keep-a8"])
def test_bytes_are_refused_where_the_target_has_no_products_of_them(name):
    with pytest.raises(UnsupportedError, match="dot products of bytes"):
        scheme_of(name).resolved("cpu:avx2", frozenset())


def test_keep_takes_the_activations_that_suit_the_target():
    assert scheme_of("keep").resolved("cpu", frozenset({"int8"})).name == "keep-a8"
    assert scheme_of("keep").resolved("cpu", frozenset()).name == "keep-a16"
    bf16 = scheme_of("bf16")
    assert bf16.resolved("cpu", frozenset({"bfloat16"})).activations == "bfloat16"
    assert bf16.resolved("cpu", frozenset()).activations == "float32"
