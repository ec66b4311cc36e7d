import pytest
from graphs import T, assert_becomes, assert_idempotent, assert_unchanged, graph
from interpreter import assert_same_numbers
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.canonicalize import canonicalize
from llmc.compiler.passes.fuse_rope import fuse_rope

D = 8
X, TABLE = [1, T, 3, D], [1, T, D]
PARAMS = {"x": X, "cos": TABLE, "sin": TABLE}


def transposed(emit, x):
    return emit(relax.op.permute_dims(x, [0, 2, 1, 3]))


def part(emit, x, begin, end):
    return emit(relax.op.strided_slice(x, [3], [begin], [end]))


def per_head(emit, table):
    return emit(relax.op.expand_dims(table, 1))


def rotate_half(emit, x, width=D):
    low, high = part(emit, x, 0, width // 2), part(emit, x, width // 2, width)
    return emit(relax.op.concat([emit(relax.op.negative(high)), low], -1))


def rotated(emit, x, cos, sin, rotate=rotate_half):
    """x · cos + rotate(x) · sin with heads first."""
    cos, sin = per_head(emit, cos), per_head(emit, sin)
    straight = emit(relax.op.multiply(x, cos))
    crossed = emit(relax.op.multiply(rotate(emit, x), sin))
    return relax.op.add(straight, crossed)


def split_halves(emit, x, cos, sin):
    """concat(x1·cos - x2·sin, x2·cos + x1·sin), tables of half the width."""
    cos, sin = per_head(emit, cos), per_head(emit, sin)
    x1, x2 = part(emit, x, 0, D // 2), part(emit, x, D // 2, D)
    products = [emit(relax.op.multiply(a, b)) for a, b in ((x1, cos), (x2, sin))]
    low = emit(relax.op.subtract(*products))
    products = [emit(relax.op.multiply(a, b)) for a, b in ((x2, cos), (x1, sin))]
    return relax.op.concat([low, emit(relax.op.add(*products))], -1)


def test_a_rotation_moves_before_the_transposition_of_heads():
    def expected(emit, x, cos, sin):
        return relax.op.permute_dims(
            emit(dialect.Rope(rotary_dim=D).call(x, cos, sin)), [0, 2, 1, 3]
        )

    before = graph(lambda emit, x, cos, sin: rotated(emit, transposed(emit, x), cos, sin), **PARAMS)
    assert_becomes(fuse_rope, before, graph(expected, **PARAMS))
    assert_idempotent(fuse_rope, before)
    assert_same_numbers(before, fuse_rope(before))


def test_heads_that_were_never_transposed_are_turned_and_turned_back():
    def expected(emit, x, cos, sin):
        rows = transposed(emit, x)
        return relax.op.permute_dims(
            emit(dialect.Rope(rotary_dim=D).call(rows, cos, sin)), [0, 2, 1, 3]
        )

    params = {**PARAMS, "x": [1, 3, T, D]}
    before = graph(rotated, **params)
    assert_becomes(fuse_rope, before, graph(expected, **params))
    assert_same_numbers(before, fuse_rope(before))


def test_the_spelling_by_halves_doubles_its_tables():
    def expected(emit, x, cos, sin):
        cos4, sin4 = per_head(emit, cos), per_head(emit, sin)
        tables = [emit(relax.op.concat([t, t], -1)) for t in (cos4, sin4)]
        shape = relax.ShapeExpr([1, T, D])
        flat = [emit(relax.op.reshape(t, shape)) for t in tables]
        return relax.op.permute_dims(emit(dialect.Rope(rotary_dim=D).call(x, *flat)), [0, 2, 1, 3])

    half = [1, T, D // 2]
    params = {"x": X, "cos": half, "sin": half}
    before = graph(
        lambda emit, x, cos, sin: split_halves(emit, transposed(emit, x), cos, sin), **params
    )
    assert_becomes(fuse_rope, before, graph(expected, **params))
    assert_same_numbers(before, fuse_rope(before))


def partial(emit, x, cos, sin, kept=(4, D)):
    heads = transposed(emit, x)
    turned = emit(
        rotated(emit, part(emit, heads, 0, 4), cos, sin, lambda e, v: rotate_half(e, v, 4))
    )
    return relax.op.concat([turned, part(emit, heads, *kept)], -1)


def test_a_rotation_of_the_first_features_is_one_operator():
    def expected(emit, x, cos, sin):
        return relax.op.permute_dims(
            emit(dialect.Rope(rotary_dim=4).call(x, cos, sin)), [0, 2, 1, 3]
        )

    params = {"x": X, "cos": [1, T, 4], "sin": [1, T, 4]}
    before = graph(partial, **params)
    assert_becomes(
        lambda mod: canonicalize(fuse_rope(mod)), before, canonicalize(graph(expected, **params))
    )
    assert_same_numbers(before, fuse_rope(before))


def test_a_partial_rotation_with_other_features_behind_it_keeps_its_concatenation():
    """concat(rope(x[:4]), x[2:6]) has the right width, not the right features."""

    def body(emit, x, cos, sin):
        return partial(emit, x, cos, sin, kept=(2, 6))

    before = graph(body, x=X, cos=[1, T, 4], sin=[1, T, 4])
    after = fuse_rope(before)
    assert "relax.op.concat" in after.script() or "R.concat" in after.script()
    assert_same_numbers(before, after)


def wrong_sign(emit, x):
    low, high = part(emit, x, 0, D // 2), part(emit, x, D // 2, D)
    return emit(relax.op.concat([high, emit(relax.op.negative(low))], -1))


def wrong_half(emit, x):
    low, high = part(emit, x, 0, D // 2), part(emit, x, D // 2, D)
    return emit(relax.op.concat([emit(relax.op.negative(low)), high], -1))


def unequal_halves(emit, x):
    low, high = part(emit, x, 0, 3), part(emit, x, 3, D)
    return emit(relax.op.concat([emit(relax.op.negative(high)), low], -1))


def neighbours(emit, x):
    """(-x1, x0, -x3, x2…): the interleaved arrangement pairs other features."""
    even = emit(relax.op.strided_slice(x, [3], [0], [D], [2]))
    odd = emit(relax.op.negative(emit(relax.op.strided_slice(x, [3], [1], [D], [2]))))
    pairs = [emit(relax.op.expand_dims(v, 4)) for v in (odd, even)]
    joined = emit(relax.op.concat(pairs, 4))
    return emit(relax.op.reshape(joined, relax.ShapeExpr([1, 3, T, D])))


@pytest.mark.parametrize("rotate", [wrong_sign, wrong_half, unequal_halves, neighbours])
def test_another_rotation_is_left_alone(rotate):
    def body(emit, x, cos, sin):
        return rotated(emit, transposed(emit, x), cos, sin, rotate)

    assert_unchanged(fuse_rope, graph(body, **PARAMS))


def test_halves_of_another_tensor_are_left_alone():
    def body(emit, x, y, cos, sin):
        first, second = transposed(emit, x), transposed(emit, y)
        return rotated(emit, first, cos, sin, lambda e, _: rotate_half(e, second))

    assert_unchanged(fuse_rope, graph(body, y=X, **PARAMS))


@pytest.mark.parametrize("shape", [[1, T, 1], [1, 1, D]])
def test_tables_that_are_broadcast_over_features_or_tokens_are_left_alone(shape):
    def body(emit, x, cos, sin):
        return rotated(emit, transposed(emit, x), cos, sin)

    assert_unchanged(fuse_rope, graph(body, x=X, cos=shape, sin=shape))


def test_halves_with_swapped_tables_are_left_alone():
    def body(emit, x, cos, sin):
        heads = transposed(emit, x)
        cos, sin = per_head(emit, cos), per_head(emit, sin)
        x1, x2 = part(emit, heads, 0, D // 2), part(emit, heads, D // 2, D)
        low = [emit(relax.op.multiply(a, b)) for a, b in ((x1, cos), (x2, sin))]
        high = [emit(relax.op.multiply(a, b)) for a, b in ((x2, sin), (x1, cos))]
        low = emit(relax.op.subtract(*low))
        return relax.op.concat([low, emit(relax.op.add(*high))], -1)

    half = [1, T, D // 2]
    assert_unchanged(fuse_rope, graph(body, x=X, cos=half, sin=half))
