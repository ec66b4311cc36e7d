import pytest
from graphs import T, assert_becomes, assert_idempotent, assert_unchanged, graph
from interpreter import assert_same_numbers
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.fuse_norm import fuse_norm

X, W = [1, T, 8], [8]


def normalized(emit, x, eps=1e-5, axis=-1, keepdims=True):
    """x / rms(x), as models write it."""
    square = emit(relax.op.multiply(x, x))
    mean = emit(relax.op.mean(square, axis, keepdims))
    factor = emit(relax.op.rsqrt(emit(relax.op.add(mean, relax.const(eps, "float32")))))
    return emit(relax.op.multiply(x, factor))


def norm(emit, x, w):
    return relax.op.multiply(w, normalized(emit, x))


def eps_of(value: float) -> float:
    """The constant as float32 holds it."""
    return float(relax.const(value, "float32").value.numpy())


def test_the_chain_becomes_one_operator():
    before = graph(norm, x=X, w=W)
    expected = graph(lambda emit, x, w: dialect.RmsNorm(eps=eps_of(1e-5)).call(x, w), x=X, w=W)
    assert_becomes(fuse_norm, before, expected)
    assert_idempotent(fuse_norm, before)
    assert_same_numbers(before, fuse_norm(before))


@pytest.mark.parametrize("weight_first", [True, False])
def test_a_weight_that_is_stored_minus_one_gets_offset_one(weight_first):
    def body(emit, x, w):
        shifted = emit(relax.op.add(w, relax.const(1.0, "float32")))
        value = normalized(emit, x)
        return relax.op.multiply(*((shifted, value) if weight_first else (value, shifted)))

    before = graph(body, x=X, w=W)
    op = dialect.RmsNorm(eps=eps_of(1e-5), offset=1.0)
    assert_becomes(fuse_norm, before, graph(lambda emit, x, w: op.call(x, w), x=X, w=W))
    assert_same_numbers(before, fuse_norm(before))


def test_a_transposition_of_heads_moves_behind_the_norm():
    def body(emit, x, w):
        return norm(emit, emit(relax.op.permute_dims(x, [0, 2, 1, 3])), w)

    def expected(emit, x, w):
        value = emit(dialect.RmsNorm(eps=eps_of(1e-5)).call(x, w))
        return relax.op.permute_dims(value, [0, 2, 1, 3])

    before = graph(body, x=[1, T, 3, 8], w=W)
    assert_becomes(fuse_norm, before, graph(expected, x=[1, T, 3, 8], w=W))
    assert_same_numbers(before, fuse_norm(before))


def test_a_transposition_of_the_features_stays_before_the_norm():
    def body(emit, x, w):
        return norm(emit, emit(relax.op.permute_dims(x, [0, 2, 3, 1])), w)

    def expected(emit, x, w):
        turned = emit(relax.op.permute_dims(x, [0, 2, 3, 1]))
        return dialect.RmsNorm(eps=eps_of(1e-5)).call(turned, w)

    params = {"x": [1, 8, T, 3], "w": W}
    assert_becomes(fuse_norm, graph(body, **params), graph(expected, **params))


def wrong_axis(emit, x, w):
    return relax.op.multiply(w, normalized(emit, x, axis=1))


def two_axes(emit, x, w):
    return relax.op.multiply(w, normalized(emit, x, axis=[1, 2]))


def square_of_another(emit, x, w):
    other = emit(relax.op.negative(x))
    square = emit(relax.op.multiply(x, other))
    mean = emit(relax.op.mean(square, -1, True))
    factor = emit(relax.op.rsqrt(emit(relax.op.add(mean, relax.const(1e-5, "float32")))))
    return relax.op.multiply(w, emit(relax.op.multiply(x, factor)))


def scales_another(emit, x, w):
    square = emit(relax.op.multiply(x, x))
    mean = emit(relax.op.mean(square, -1, True))
    factor = emit(relax.op.rsqrt(emit(relax.op.add(mean, relax.const(1e-5, "float32")))))
    return relax.op.multiply(w, emit(relax.op.multiply(emit(relax.op.negative(x)), factor)))


def eps_that_varies(emit, x, w):
    square = emit(relax.op.multiply(x, x))
    mean = emit(relax.op.mean(square, -1, True))
    factor = emit(relax.op.rsqrt(emit(relax.op.add(mean, mean))))
    return relax.op.multiply(w, emit(relax.op.multiply(x, factor)))


@pytest.mark.parametrize(
    "body", [wrong_axis, two_axes, square_of_another, scales_another, eps_that_varies]
)
def test_what_is_not_an_rms_norm_is_left_alone(body):
    assert_unchanged(fuse_norm, graph(body, x=X, w=W))


@pytest.mark.parametrize("weight", [[1], [T, 8], [1, 1, 8]])
def test_a_weight_that_is_not_one_number_a_feature_is_left_alone(weight):
    assert_unchanged(fuse_norm, graph(norm, x=X, w=weight))


def test_a_norm_of_rank_two_is_left_alone_because_no_kernel_takes_it():
    assert_unchanged(fuse_norm, graph(norm, x=[T, 8], w=W))
