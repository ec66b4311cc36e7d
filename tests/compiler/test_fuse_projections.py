import numpy as np
from graphs import T, assert_idempotent, graph, planned, settled
from interpreter import random_inputs, run
from tvm import relax
from tvm.ir import assert_structural_equal

from llmc import dialect
from llmc.compiler import weight_plan
from llmc.compiler.passes.fuse_projections import fuse_projections
from llmc.compiler.weight_plan import WeightSpec

X = [1, T, 8]
F16 = dialect.Linear(format="f16")


def pieces(emit, product, *widths):
    found, begin = [], 0
    for width in widths:
        end = begin + width
        found.append(emit(relax.op.strided_slice(product, [2], [begin], [end])))
        begin = end
    return found


def left_alone(mod):
    assert_structural_equal(fuse_projections(mod), settled(mod), map_free_vars=True)


def test_siblings_become_one_product_and_its_slices():
    def before(emit, x, q, k):
        return relax.op.concat([emit(F16.call(x, q)), emit(F16.call(x, k))], 2)

    def expected(emit, x, q__k):
        return relax.op.concat(pieces(emit, emit(F16.call(x, q__k)), 6, 4), 2)

    params = {"q": [6, 8], "k": [4, 8]}
    mod = planned(graph(before, x=X, **params), q="f16", k="f16")
    wanted = planned(
        graph(expected, x=X, q__k=[10, 8]), q__k=WeightSpec(sources=["q", "k"], format="f16")
    )
    assert_structural_equal(fuse_projections(mod), settled(wanted), map_free_vars=True)
    assert_idempotent(fuse_projections, mod)


def test_rows_and_biases_are_joined_in_one_order():
    def body(emit, x, q, k, bq, bk):
        return relax.op.concat([emit(F16.call(x, q, bq)), emit(F16.call(x, k, bk))], 2)

    mod = planned(graph(body, x=X, q=[6, 8], k=[4, 8], bq=[6], bk=[4]), q="f16", k="f16")
    after = fuse_projections(mod)
    plan = weight_plan.weights_of(after)
    assert plan["bq__bk"] == WeightSpec(sources=["bq", "bk"])
    values = random_inputs(mod)
    joined = {
        name: np.concatenate([values[s] for s in spec.sources]) for name, spec in plan.items()
    }
    np.testing.assert_allclose(run(after, **values, **_new(joined, values)), run(mod, **values))


def _new(joined, values):
    return {n: v for n, v in joined.items() if n not in values}


def test_siblings_of_different_format_stay_apart():
    def body(emit, x, q, k):
        other = dialect.Linear(format="w8")
        return relax.op.add(emit(F16.call(x, q)), emit(other.call(x, k)))

    left_alone(planned(graph(body, x=X, q=[6, 8], k=[6, 8]), q="f16", k="w8"))


def test_siblings_that_the_model_stores_in_different_orientation_stay_apart():
    def body(emit, x, q, k):
        return relax.op.add(emit(F16.call(x, q)), emit(F16.call(x, k)))

    turned = WeightSpec(sources=["k"], format="f16", transposed=True)
    left_alone(planned(graph(body, x=X, q=[6, 8], k=[6, 8]), q="f16", k=turned))


def test_a_product_with_a_bias_and_one_without_stay_apart():
    def body(emit, x, q, k, b):
        return relax.op.add(emit(F16.call(x, q, b)), emit(F16.call(x, k)))

    left_alone(planned(graph(body, x=X, q=[6, 8], k=[6, 8], b=[6]), q="f16", k="f16"))


def test_products_of_different_inputs_stay_apart():
    def body(emit, x, q, k):
        y = emit(relax.op.negative(x))
        return relax.op.add(emit(F16.call(x, q)), emit(F16.call(y, k)))

    left_alone(planned(graph(body, x=X, q=[6, 8], k=[6, 8]), q="f16", k="f16"))


def test_a_weight_that_is_read_twice_keeps_its_own_argument():
    """A tied embedding, or one matrix for two products."""

    def body(emit, x, q, k):
        first, second = emit(F16.call(x, q)), emit(F16.call(x, k))
        again = emit(F16.call(emit(relax.op.negative(x)), k))
        return relax.op.add(emit(relax.op.add(first, second)), again)

    left_alone(planned(graph(body, x=X, q=[6, 8], k=[6, 8]), q="f16", k="f16"))
