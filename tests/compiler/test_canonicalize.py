import pytest
from graphs import INPUTS, T, assert_becomes, assert_idempotent, assert_unchanged, graph
from interpreter import assert_same_numbers
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.canonicalize import canonicalize

X = [1, T, 8]
END = 2**63 - 1  # how torch writes "to the end"
IDS = INPUTS["input_ids"]


def const(value):
    return relax.const(value, "float32")


def reshaped(x, *shape):
    return relax.op.reshape(x, relax.ShapeExpr(list(shape)))


def sliced(x, begin, end):
    return relax.op.strided_slice(x, [2], [begin], [end])


def check(before, expected, **params):
    """before becomes expected, says the same in numbers, and a second round changes nothing."""
    start = graph(before, **params)
    assert_becomes(canonicalize, start, graph(expected, **params))
    assert_idempotent(canonicalize, start)
    assert_same_numbers(start, canonicalize(start))


# Products and tables.


def test_a_product_with_a_transposed_parameter_is_a_linear():
    check(
        lambda emit, x, w: relax.op.matmul(x, emit(relax.op.permute_dims(w))),
        lambda emit, x, w: dialect.Linear().call(x, w),
        x=X,
        w=[4, 8],
    )


def test_a_product_with_a_parameter_is_a_linear_on_a_transposed_weight():
    check(
        lambda emit, x, w: relax.op.matmul(x, w),
        lambda emit, x, w: dialect.Linear(transposed=True).call(x, w),
        x=X,
        w=[8, 4],
    )


def test_a_permutation_that_moves_nothing_does_not_transpose_the_weight():
    def before(emit, x, w):
        return relax.op.matmul(x, emit(relax.op.permute_dims(w, [0, 1])))

    mod = graph(before, x=X, w=[8, 8])
    assert_same_numbers(mod, canonicalize(mod))


def test_a_product_of_two_computed_tensors_stays():
    def body(emit, x, y):
        return relax.op.matmul(x, emit(relax.op.negative(y)))

    assert_unchanged(canonicalize, graph(body, x=X, y=[8, 4]))


def test_a_stack_of_matrices_stays():
    body = lambda emit, x, w: relax.op.matmul(x, w)  # noqa: E731
    assert_unchanged(canonicalize, graph(body, x=X, w=[3, 8, 4]))


def test_rows_without_a_leading_axis_get_one():
    def expected(emit, x, w, b):
        rows = emit(reshaped(x, 1, T, 8))
        return reshaped(emit(dialect.Linear().call(rows, w, b)), T, 4)

    check(lambda emit, x, w, b: dialect.Linear().call(x, w, b), expected, x=[T, 8], w=[4, 8], b=[4])


def test_a_product_of_each_head_becomes_one_of_rows():
    def expected(emit, x, w):
        rows = emit(reshaped(x, 1, T * 3, 8))
        return reshaped(emit(dialect.Linear().call(rows, w)), 1, T, 3, 4)

    check(lambda emit, x, w: dialect.Linear().call(x, w), expected, x=[1, T, 3, 8], w=[4, 8])


def test_the_reshape_that_a_linear_gets_cancels_the_one_before_it():
    check(
        lambda emit, x, w: reshaped(
            emit(dialect.Linear().call(emit(reshaped(x, T, 8)), w)), 1, T, 4
        ),
        lambda emit, x, w: dialect.Linear().call(x, w),
        x=X,
        w=[4, 8],
    )


def test_rows_cut_from_longer_ones_keep_their_own_width():
    """[1, T, 8] seen as [2T, 4] is not a product over 8 features."""

    def before(emit, x, w):
        return dialect.Linear().call(emit(reshaped(x, T * 2, 4)), w)

    def expected(emit, x, w):
        rows = emit(reshaped(x, 1, T * 2, 4))
        return reshaped(emit(dialect.Linear().call(rows, w)), T * 2, 3)

    check(before, expected, x=X, w=[3, 4])


def test_a_look_up_by_the_packed_ids_is_an_embedding():
    def before(emit, input_ids, w):
        flat = emit(reshaped(input_ids, T))
        return reshaped(emit(relax.op.take(w, flat, 0, mode="fast")), 1, T, 8)

    check(
        before, lambda emit, input_ids, w: dialect.Embedding().call(input_ids, w),
        input_ids=IDS, w=[32, 8],
    )  # fmt: skip


def test_a_look_up_by_ids_with_their_leading_axis_is_an_embedding():
    check(
        lambda emit, input_ids, w: relax.op.take(w, input_ids, 0, mode="fast"),
        lambda emit, input_ids, w: dialect.Embedding().call(input_ids, w),
        input_ids=IDS,
        w=[32, 8],
    )


def test_other_look_ups_clip_an_index_out_of_bounds():
    check(
        lambda emit, logits_rows, x: relax.op.take(x, logits_rows, 1, mode="fast"),
        lambda emit, logits_rows, x: relax.op.take(x, logits_rows, 1, mode="clip"),
        logits_rows=INPUTS["logits_rows"],
        x=X,
    )


# Slices, pieces, shapes.


@pytest.mark.parametrize(("begin", "end"), [(0, END), (0, 8), (-8, 100)])
def test_a_full_slice_is_the_tensor(begin, end):
    def before(emit, x):
        return relax.op.negative(emit(sliced(x, begin, end)))

    check(before, lambda emit, x: relax.op.negative(x), x=X)


@pytest.mark.parametrize(
    ("begin", "end", "found"),
    [(4, END, (4, 8)), (-3, END, (5, 8)), (1, -2, (1, 6)), (-100, 3, (0, 3))],
)
def test_ends_become_explicit(begin, end, found):
    check(lambda emit, x: sliced(x, begin, end), lambda emit, x: sliced(x, *found), x=X)


def test_a_slice_of_a_slice_is_one_slice():
    check(
        lambda emit, x: sliced(emit(sliced(x, 2, 7)), 1, END),
        lambda emit, x: sliced(x, 3, 7),
        x=X,
    )


def test_slices_with_strides_or_of_several_axes_stay():
    def strided(emit, x):
        return relax.op.strided_slice(x, [2], [0], [8], [2])

    def several(emit, x):
        return relax.op.strided_slice(x, [2, 3], [0, 1], [2, 3])

    assert_unchanged(canonicalize, graph(strided, x=X))
    assert_unchanged(canonicalize, graph(several, x=[1, T, 4, 4]))


def test_a_slice_up_to_a_symbolic_end_stays():
    def body(emit, x):
        return relax.op.strided_slice(x, [2], [0], [T])

    assert_unchanged(canonicalize, graph(body, x=X))


@pytest.mark.parametrize(
    ("sections", "index", "bounds"),
    [(2, 1, (5, 10)), (3, 0, (0, 4)), (3, 1, (4, 8)), (3, 2, (8, 10)), ([2, 7], 1, (2, 7))],
)
def test_a_piece_of_a_split_is_a_slice(sections, index, bounds):
    """Unequal sections: all but the last are rounded up."""
    check(
        lambda emit, x: relax.TupleGetItem(emit(relax.op.split(x, sections, axis=2)), index),
        lambda emit, x: sliced(x, *bounds),
        x=[1, T, 10],
    )


def test_empty_pieces_of_a_concatenation_vanish():
    def before(emit, x):
        return relax.op.concat([emit(sliced(x, 0, 0)), x, emit(sliced(x, 4, 8))], 2)

    def expected(emit, x):
        return relax.op.concat([x, emit(sliced(x, 4, 8))], 2)

    check(before, expected, x=X)


def test_a_concatenation_of_one_piece_is_that_piece():
    def before(emit, x):
        joined = emit(relax.op.concat([x, emit(sliced(x, 8, 8))], 2))
        return relax.op.negative(emit(relax.op.concat([joined], 2)))

    check(before, lambda emit, x: relax.op.negative(x), x=X)


def test_a_chain_of_reshapes_is_one_and_one_back_is_none():
    def before(emit, x):
        return reshaped(emit(reshaped(x, T, 8)), 1, T, 2, 4)

    check(before, lambda emit, x: reshaped(x, 1, T, 2, 4), x=X)
    check(
        lambda emit, x: relax.op.negative(emit(reshaped(emit(reshaped(x, T, 8)), 1, T, 8))),
        lambda emit, x: relax.op.negative(x),
        x=X,
    )


def test_two_permutations_are_one_or_none():
    def twice(first, second):
        def body(emit, x):
            return relax.op.permute_dims(emit(relax.op.permute_dims(x, first)), second)

        return body

    params = {"x": [1, T, 2, 4]}
    check(
        twice([0, 2, 1, 3], [3, 0, 1, 2]),
        lambda emit, x: relax.op.permute_dims(x, [3, 0, 2, 1]),
        **params,
    )
    check(
        lambda emit, x: relax.op.negative(emit(twice([0, 2, 3, 1], [0, 3, 1, 2])(emit, x))),
        lambda emit, x: relax.op.negative(x),
        **params,
    )


# Arithmetic that says nothing.


def test_factors_of_one_and_casts_to_the_own_type_vanish():
    def before(emit, x):
        same = emit(relax.op.astype(x, "float32"))
        return relax.op.negative(emit(relax.op.multiply(const(1.0), same)))

    start = graph(before, x=X)
    assert_becomes(canonicalize, start, graph(lambda emit, x: relax.op.negative(x), x=X))


def test_a_factor_of_one_that_broadcasts_stays():
    def body(emit, x, w):
        return relax.op.multiply(x, w)

    ones = lambda emit, x: relax.op.multiply(x, relax.const([[[1.0]]] * 3, "float32"))  # noqa: E731
    assert_unchanged(canonicalize, graph(ones, x=X))
    assert_unchanged(canonicalize, graph(body, x=X, w=[1]))


def test_widening_ids_and_back_vanishes_but_narrowing_stays():
    def through(wide):
        def body(emit, input_ids):
            cast = emit(relax.op.astype(emit(relax.op.astype(input_ids, wide)), "int32"))
            return relax.op.negative(cast)

        return graph(body, input_ids=IDS)

    plain = graph(lambda emit, input_ids: relax.op.negative(input_ids), input_ids=IDS)
    assert_becomes(canonicalize, through("int64"), plain)
    assert_unchanged(canonicalize, through("int8"))
    assert_unchanged(canonicalize, through("float32"))


def test_small_powers_are_products():
    check(
        lambda emit, x: relax.op.power(x, const(2.0)),
        lambda emit, x: relax.op.multiply(x, x),
        x=X,
    )
    check(
        lambda emit, x: relax.op.power(x, const(3.0)),
        lambda emit, x: relax.op.multiply(emit(relax.op.multiply(x, x)), x),
        x=X,
    )


def test_other_powers_stay():
    assert_unchanged(canonicalize, graph(lambda emit, x: relax.op.power(x, const(0.5)), x=X))
    widening = lambda emit, x: relax.op.power(x, const([[[[2.0]]]]))  # noqa: E731
    assert_unchanged(canonicalize, graph(widening, x=X))


# Operators with kernels of their own.


def test_layer_norm_over_the_features_is_the_dialect_operator():
    def before(emit, x, w, b):
        return relax.op.nn.layer_norm(x, w, b, axes=[-1], epsilon=1e-6)

    def expected(emit, x, w, b):
        return dialect.LayerNorm(eps=1e-6).call(x, w, b)

    params = {"x": X, "w": [8], "b": [8]}
    assert_becomes(canonicalize, graph(before, **params), graph(expected, **params))


def test_layer_norm_over_another_axis_or_of_heads_stays():
    def over(axis):
        return lambda emit, x, w, b: relax.op.nn.layer_norm(x, w, b, axes=[axis])

    assert_unchanged(canonicalize, graph(over(0), x=[8, T, 3], w=[8], b=[8]))
    assert_unchanged(canonicalize, graph(over(-1), x=[1, T, 2, 8], w=[8], b=[8]))


def test_the_best_experts_are_found_by_the_dialect_operator():
    def before(emit, x):
        both = emit(relax.op.topk(x, 2, axis=-1, ret_type="both", dtype="int64"))
        return relax.TupleGetItem(both, 1)

    def expected(emit, x):
        pair = emit(dialect.TopK(k=2).call(x))
        return relax.op.astype(emit(relax.TupleGetItem(pair, 1)), "int64")

    start = graph(before, x=[T, 6])
    assert_becomes(canonicalize, start, graph(expected, x=[T, 6]))
    assert_idempotent(canonicalize, start)


@pytest.mark.parametrize("options", [{"largest": False, "axis": -1}, {"axis": 0}])
def test_the_smallest_or_the_best_of_a_column_stay(options):
    def body(emit, x):
        return relax.TupleGetItem(emit(relax.op.topk(x, 2, ret_type="both", **options)), 0)

    assert_unchanged(canonicalize, graph(body, x=[T, 6]))
