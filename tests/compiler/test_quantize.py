import pytest
from graphs import INPUTS, T, assert_idempotent, graph, planned, settled
from tvm import relax
from tvm.ir import assert_structural_equal

from llmc import dialect
from llmc.compiler import weight_plan
from llmc.compiler.passes.quantize import quantize
from llmc.compiler.weight_plan import WeightSpec
from llmc.errors import UnsupportedError

IDS, X = INPUTS["input_ids"], [1, T, 8]
INPUTS_USED = {n: INPUTS[n] for n in ("input_ids", "logits_rows")}


def choose(sources, features, is_vocabulary):
    """w8 for the vocabulary, w4-g32 where the group divides the features, else f16."""
    if is_vocabulary:
        return "w8"
    return "w4-g32" if features % 32 == 0 else "f16"


def run(mod):
    return quantize(mod, choose)


def formats(mod) -> dict[str, str]:
    return {name: spec.format for name, spec in weight_plan.weights_of(mod).items()}


def test_each_product_gets_the_format_its_features_allow():
    def body(emit, x, a, b, norm):
        h = emit(dialect.RmsNorm(eps=1e-5).call(x, norm))
        return dialect.Linear().call(emit(dialect.Linear().call(h, a)), b)

    def expected(emit, x, a, b, norm):
        h = emit(dialect.RmsNorm(eps=1e-5).call(x, norm))
        inner = emit(dialect.Linear(format="f16").call(h, a))
        return dialect.Linear(format="w4-g32").call(inner, b)

    params = {"x": X, "a": [32, 8], "b": [8, 32], "norm": [8]}
    after = run(planned(graph(body, **params)))
    wanted = planned(graph(expected, **params), a="f16", b="w4-g32")
    assert_structural_equal(after, settled(wanted), map_free_vars=True)
    assert_idempotent(run, planned(graph(body, **params)))


def test_a_transposed_weight_becomes_an_argument_of_rows():
    """The plan transposes when it runs; the group is counted along the input features."""

    def body(emit, x, a):
        return dialect.Linear(transposed=True).call(x, a)

    def expected(emit, x, a):
        return dialect.Linear(format="w4-g32").call(x, a)

    x = [1, T, 32]
    after = run(planned(graph(body, x=x, a=[32, 7])))
    spec = WeightSpec(sources=["a"], format="w4-g32", transposed=True)
    wanted = planned(graph(expected, x=x, a=[7, 32]), a=spec)
    assert_structural_equal(after, settled(wanted), map_free_vars=True)


def test_stacked_experts_are_transposed_expert_by_expert():
    def body(emit, x, a, ids):
        return dialect.GroupedLinear(transposed=True).call(x, a, None, ids)

    def expected(emit, x, a, ids):
        return dialect.GroupedLinear(format="w4-g32").call(x, a, None, ids)

    params = {"x": [T, 32], "ids": ([T, 2], "int32")}
    after = run(planned(graph(body, a=[4, 32, 7], **params)))
    spec = WeightSpec(sources=["a"], format="w4-g32", transposed=True)
    wanted = planned(graph(expected, a=[4, 7, 32], **params), a=spec)
    assert_structural_equal(after, settled(wanted), map_free_vars=True)


def test_embedding_and_logits_are_vocabulary():
    def body(emit, input_ids, logits_rows, table, inner, head):
        h = emit(dialect.Embedding().call(input_ids, table))
        h = emit(dialect.Linear().call(h, inner))
        h = emit(relax.op.take(h, logits_rows, 1, mode="clip"))
        return dialect.Linear().call(h, head)

    params = {"table": [50, 32], "inner": [32, 32], "head": [50, 32]}
    after = run(planned(graph(body, **INPUTS_USED, **params)))
    assert formats(after) == {"table": "w8", "inner": "w4-g32", "head": "w8"}


def test_a_tied_table_has_one_format_for_both_uses():
    def body(emit, input_ids, table):
        return dialect.Linear().call(emit(dialect.Embedding().call(input_ids, table)), table)

    after = run(planned(graph(body, input_ids=IDS, table=[50, 32])))
    assert formats(after) == {"table": "w8"}
    found = [dialect.match_any(b.value) for b in after["main"].body.blocks[0].bindings]
    assert [f.op.format for f in found if f] == ["w8", "w8"]


@pytest.mark.parametrize("kind", ["relax", "dialect"])
def test_a_router_stays_exact(kind):
    """Its choice is discrete: a rounding error would send a token to another expert."""

    def body(emit, x, router, up):
        scores = emit(dialect.Linear().call(x, router))
        shares = emit(relax.op.nn.softmax(emit(relax.op.reshape(scores, shape(T, 4))), -1))
        if kind == "relax":
            pair = emit(relax.op.topk(shares, 2, ret_type="both", dtype="int32"))
        else:
            pair = emit(dialect.TopK(k=2).call(shares))
        ids = emit(relax.TupleGetItem(pair, 1))
        rows = emit(relax.op.reshape(x, shape(T, 32)))
        return dialect.GroupedLinear().call(rows, up, None, ids)

    after = run(planned(graph(body, x=[1, T, 32], router=[4, 32], up=[4, 16, 32])))
    assert formats(after) == {"x": "f32", "router": "f32", "up": "w4-g32"}


def test_what_a_router_reads_is_quantized():
    def body(emit, x, first, router):
        h = emit(dialect.Linear().call(x, first))
        scores = emit(dialect.Linear().call(h, router))
        best = emit(dialect.TopK(k=2).call(emit(relax.op.reshape(scores, shape(T, 4)))))
        return relax.TupleGetItem(best, 0)

    after = run(planned(graph(body, x=[1, T, 32], first=[32, 32], router=[4, 32])))
    assert formats(after) == {"x": "f32", "first": "w4-g32", "router": "f32"}


def test_a_weight_that_something_else_reads_too_is_refused():
    def body(emit, x, a):
        y = emit(dialect.Linear().call(x, a))
        return relax.op.add(y, emit(relax.op.sum(a)))

    with pytest.raises(UnsupportedError, match="weight a is read by products and in 1 other ways"):
        run(planned(graph(body, x=X, a=[8, 8])))


def test_a_weight_that_is_read_in_both_orientations_is_refused():
    def body(emit, x, a):
        y = emit(dialect.Linear().call(x, a))
        return dialect.Linear(transposed=True).call(y, a)

    with pytest.raises(UnsupportedError, match="1 of 2 products transposed"):
        run(planned(graph(body, x=X, a=[8, 8])))


def test_a_product_with_a_computed_matrix_is_left_alone():
    def body(emit, x, a):
        return dialect.Linear().call(x, emit(relax.op.negative(a)))

    mod = planned(graph(body, x=X, a=[8, 8]))
    assert_structural_equal(run(mod), settled(mod), map_free_vars=True)


def shape(*extents):
    return relax.ShapeExpr(list(extents))
