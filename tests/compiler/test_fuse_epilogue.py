from graphs import T, assert_becomes, assert_idempotent, assert_unchanged, graph
from interpreter import assert_same_numbers
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.fuse_epilogue import fuse_epilogue

X = [1, T, 8]
LINEAR = dialect.Linear(format="f32")
NORM = dialect.RmsNorm(eps=1e-5)
BOTH = dialect.AddRmsNorm(eps=1e-5)


def check(before, expected, **params):
    start = graph(before, **params)
    assert_becomes(fuse_epilogue, start, graph(expected, **params))
    assert_idempotent(fuse_epilogue, start)
    assert_same_numbers(start, fuse_epilogue(start))


def test_a_residual_moves_into_the_product_it_is_added_to():
    params = {"x": X, "r": X, "w": [8, 8], "b": [8]}
    for swap in (False, True):
        check(
            lambda emit, x, r, w, b, swap=swap: relax.op.add(
                *_ordered(emit(LINEAR.call(x, w, b)), r, swap)
            ),
            lambda emit, x, r, w, b: LINEAR.call(x, w, b, r),
            **params,
        )


def _ordered(a, b, swap):
    return (b, a) if swap else (a, b)


def test_a_product_that_is_read_twice_keeps_its_own_value():
    def body(emit, x, r, w):
        y = emit(LINEAR.call(x, w))
        total = emit(relax.op.add(y, r))
        return relax.op.multiply(total, y)

    assert_unchanged(fuse_epilogue, graph(body, x=X, r=X, w=[8, 8]))


def test_a_residual_that_is_broadcast_stays_outside():
    def body(emit, x, r, w):
        return relax.op.add(emit(LINEAR.call(x, w)), r)

    assert_unchanged(fuse_epilogue, graph(body, x=X, r=[8], w=[8, 8]))


def test_of_two_products_that_are_added_the_first_takes_the_second():
    def before(emit, x, a, b):
        first, second = emit(LINEAR.call(x, a)), emit(LINEAR.call(x, b))
        return relax.op.add(first, second)

    def expected(emit, x, a, b):
        second = emit(LINEAR.call(x, b))
        return LINEAR.call(x, a, None, second)

    check(before, expected, x=X, a=[8, 8], b=[8, 8])


def test_a_second_residual_does_not_replace_the_first():
    """Parallel blocks: x + attention + feed-forward."""

    def before(emit, x, h, a, b):
        first = emit(relax.op.add(x, emit(LINEAR.call(h, a))))
        return relax.op.add(first, emit(LINEAR.call(h, b)))

    def expected(emit, x, h, a, b):
        return LINEAR.call(h, b, None, emit(LINEAR.call(h, a, None, x)))

    check(before, expected, x=X, h=X, a=[8, 8], b=[8, 8])


def test_a_sum_that_is_normalized_becomes_one_operator_with_two_results():
    def before(emit, x, r, w):
        total = emit(relax.op.add(x, r))
        return relax.op.multiply(emit(NORM.call(total, w)), total)

    def expected(emit, x, r, w):
        pair = emit(BOTH.call(x, r, w))
        total, normed = (emit(relax.TupleGetItem(pair, i)) for i in range(2))
        return relax.op.multiply(normed, total)

    check(before, expected, x=X, r=X, w=[8])


def test_the_product_takes_the_residual_before_the_norm_can():
    def before(emit, x, h, a, w):
        return NORM.call(emit(relax.op.add(x, emit(LINEAR.call(h, a)))), w)

    def expected(emit, x, h, a, w):
        return NORM.call(emit(LINEAR.call(h, a, None, x)), w)

    check(before, expected, x=X, h=X, a=[8, 8], w=[8])


def test_two_norms_of_one_sum_share_it():
    def body(emit, x, r, v, w):
        total = emit(relax.op.add(x, r))
        return relax.op.multiply(emit(NORM.call(total, v)), emit(NORM.call(total, w)))

    before = graph(body, x=X, r=X, v=[8], w=[8])
    after = fuse_epilogue(before)
    calls = [dialect.operator_name(b.value) for b in after["main"].body.blocks[0].bindings]
    assert sorted(c for c in calls if c) == ["add_rms_norm", "rms_norm"]
    assert_same_numbers(before, after)


def test_a_norm_whose_weight_is_computed_after_the_sum_is_left_alone():
    def body(emit, x, r, w):
        total = emit(relax.op.add(x, r))
        return NORM.call(total, emit(relax.op.negative(w)))

    assert_unchanged(fuse_epilogue, graph(body, x=X, r=X, w=[8]))


def test_a_norm_of_heads_is_left_alone():
    def body(emit, x, r, w):
        return NORM.call(emit(relax.op.add(x, r)), w)

    assert_unchanged(fuse_epilogue, graph(body, x=[1, T, 2, 8], r=[1, T, 2, 8], w=[8]))
