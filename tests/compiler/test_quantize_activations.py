"""Which products take their activations in bytes, and that siblings share them."""

from graphs import T, assert_idempotent, assert_unchanged, graph
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.quantize_activations import quantize_activations
from llmc.compiler.rewriter import bindings
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
