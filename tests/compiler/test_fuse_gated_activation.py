import pytest
from graphs import T, assert_becomes, assert_idempotent, assert_unchanged, graph
from interpreter import assert_same_numbers
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.fuse_gated_activation import fuse_gated_activation

X = [1, T, 12]
GATE, UP = (0, 6), (6, 12)


def gated(activation, gate=GATE, up=UP, up_first=False):
    def body(emit, x):
        halves = [emit(relax.op.strided_slice(x, [2], [b], [e])) for b, e in (gate, up)]
        activated = emit(activation(halves[0]))
        pair = (halves[1], activated) if up_first else (activated, halves[1])
        return relax.op.multiply(*pair)

    return graph(body, x=X)


def fused(kind):
    return graph(lambda emit, x: dialect.GatedActivation(kind=kind).call(x), x=X)


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        (relax.op.nn.silu, "silu"),
        (relax.op.nn.gelu, "gelu"),
        (relax.op.nn.gelu_tanh, "gelu_tanh"),
        (relax.op.nn.relu, "relu"),
    ],
)
@pytest.mark.parametrize("up_first", [False, True])
def test_an_activated_half_times_the_other_is_one_operator(activation, kind, up_first):
    before = gated(activation, up_first=up_first)
    assert_becomes(fuse_gated_activation, before, fused(kind))
    assert_idempotent(fuse_gated_activation, before)


def test_the_numbers_stay():
    before = gated(relax.op.nn.silu)
    assert_same_numbers(before, fuse_gated_activation(before))


@pytest.mark.parametrize(
    ("gate", "up"),
    [(UP, GATE), ((0, 5), (5, 10)), ((0, 4), (4, 8)), (GATE, GATE), ((1, 7), (6, 12))],
    ids=["swapped", "not whole", "not halves", "one half twice", "overlapping"],
)
def test_other_halves_are_left_alone(gate, up):
    assert_unchanged(fuse_gated_activation, gated(relax.op.nn.silu, gate, up))


@pytest.mark.parametrize("activation", [relax.op.sigmoid, relax.op.tanh])
def test_other_activations_are_left_alone(activation):
    assert_unchanged(fuse_gated_activation, gated(activation))


def test_halves_of_two_tensors_are_left_alone():
    def body(emit, x, y):
        gate = emit(relax.op.strided_slice(x, [2], [0], [6]))
        up = emit(relax.op.strided_slice(y, [2], [6], [12]))
        return relax.op.multiply(emit(relax.op.nn.silu(gate)), up)

    assert_unchanged(fuse_gated_activation, graph(body, x=X, y=X))


def test_halves_of_another_axis_are_left_alone():
    def body(emit, x):
        halves = [emit(relax.op.strided_slice(x, [1], [b], [e])) for b, e in (GATE, UP)]
        return relax.op.multiply(emit(relax.op.nn.silu(halves[0])), halves[1])

    assert_unchanged(fuse_gated_activation, graph(body, x=[1, 12, 4]))
