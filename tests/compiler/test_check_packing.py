import pytest
from graphs import INPUTS, L, T, assert_unchanged, graph
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.check_packing import check_packing
from llmc.errors import UnsupportedError

X = [1, T, 8]


def refused(body, match: str, **params) -> None:
    with pytest.raises(UnsupportedError, match=match) as raised:
        check_packing(graph(body, **params))
    assert raised.value.hint


def test_work_within_each_token_passes():
    def body(emit, x, w, table, positions):
        ids = emit(relax.op.reshape(positions, relax.ShapeExpr([T])))
        looked_up = emit(relax.op.take(table, ids, 0))
        h = emit(relax.op.add(x, emit(relax.op.expand_dims(looked_up, 0))))
        h = emit(relax.op.multiply(h, emit(relax.op.mean(h, -1, True))))
        h = emit(relax.op.matmul(h, w))
        h = emit(relax.op.concat([h, h], -1))
        h = emit(relax.op.strided_slice(h, [2], [4], [12]))
        heads = emit(relax.op.reshape(h, relax.ShapeExpr([1, T, 2, 4])))
        first = emit(relax.op.permute_dims(heads, [0, 2, 1, 3]))
        shares = emit(relax.op.nn.softmax(first, -1))
        return relax.op.permute_dims(shares, [0, 2, 1, 3])

    assert_unchanged(check_packing, graph(body, x=X, w=[8, 8], table=[32, 8], positions=POSITIONS))


POSITIONS = INPUTS["positions"]


def test_rows_of_experts_pass():
    """A token's chosen experts follow each other: [T, 2] becomes [2T] and back."""

    def body(emit, x):
        rows = emit(relax.op.reshape(x, relax.ShapeExpr([T * 2, 4])))
        rows = emit(relax.op.nn.silu(rows))
        pairs = emit(relax.op.reshape(rows, relax.ShapeExpr([T, 2, 4])))
        return relax.op.sum(pairs, 1)

    assert_unchanged(check_packing, graph(body, x=X))


def test_the_rows_whose_logits_are_wanted_may_be_gathered():
    def body(emit, logits_rows, x):
        return relax.op.take(x, logits_rows, 1)

    assert_unchanged(check_packing, graph(body, logits_rows=INPUTS["logits_rows"], x=X))


def test_constants_of_any_length_pass():
    def body(emit, x):
        ones = emit(relax.op.ones(relax.ShapeExpr([1, T, 8]), "float32"))
        half = relax.const(0.5, "float32")
        halves = emit(relax.op.full(relax.ShapeExpr([1, T, 8]), half, "float32"))
        return relax.op.add(emit(relax.op.multiply(x, ones)), halves)

    assert_unchanged(check_packing, graph(body, x=X))


def test_attention_may_mix_tokens():
    def body(emit, q, k):
        return dialect.Attention(layer=0, scale=1.0).call(q, k, k)

    assert_unchanged(check_packing, graph(body, q=[1, 4, T, 8], k=[1, 2, T, 8]))


def convolution(emit, x, w):
    turned = emit(relax.op.permute_dims(x, [0, 2, 1]))
    return relax.op.nn.conv1d(turned, w, padding=(2, 0), groups=8)


def test_a_convolution_over_tokens_is_refused_by_name():
    refused(
        convolution, r"relax\.nn\.conv1d on a tensor \[1, 8, T\] mixes the tokens", x=X, w=[8, 1, 3]
    )


ALONG_TOKENS = {
    "cumsum": lambda emit, x: relax.op.cumsum(x, 1),
    "max": lambda emit, x: relax.op.max(x, 1),
    "sum": lambda emit, x: relax.op.sum(x, None),
    "mean": lambda emit, x: relax.op.mean(x, [-2], True),
    "argmax": lambda emit, x: relax.op.argmax(x, 1),
    "softmax": lambda emit, x: relax.op.nn.softmax(x, 1),
    "sort": lambda emit, x: relax.op.sort(x, 1),
    "topk": lambda emit, x: relax.op.topk(x, 1, axis=1, ret_type="values"),
    "strided_slice": lambda emit, x: relax.op.strided_slice(x, [1], [1], [9]),
    "concat": lambda emit, x: relax.op.concat([x, x], 1),
    "flip": lambda emit, x: relax.op.flip(x, 1),
    "tile": lambda emit, x: relax.op.tile(x, [1, 1, 2]),
    "reshape": lambda emit, x: relax.op.reshape(x, relax.ShapeExpr([1, 8, T])),
}


@pytest.mark.parametrize("name", ALONG_TOKENS)
def test_what_acts_along_the_tokens_is_refused_by_name(name):
    refused(ALONG_TOKENS[name], rf"operator relax\.(nn\.)?{name} on", x=X)


def test_a_concatenation_is_seen_through_a_named_tuple():
    def body(emit, x):
        both = emit(relax.Tuple([x, x]))
        return relax.op.concat(both, 1)

    refused(body, r"relax\.concat", x=X)


def test_a_table_of_tokens_by_tokens_is_refused_where_it_is_read():
    def body(emit, x):
        row = emit(relax.op.reshape(x, relax.ShapeExpr([1, 1, T])))
        table = emit(relax.op.add(x, row))
        return relax.op.nn.relu(table)

    refused(body, r"relax\.nn\.relu", x=[1, T, 1])


def test_a_product_over_tokens_is_refused():
    def body(emit, x):
        return relax.op.matmul(emit(relax.op.permute_dims(x, [0, 2, 1])), x)

    refused(body, r"relax\.matmul", x=X)


def test_a_product_with_a_matrix_of_tokens_is_refused():
    refused(lambda emit, x, w: relax.op.matmul(w, x), r"relax\.matmul", x=[1, 8, T], w=[8, 8])


def test_a_look_up_of_tokens_by_another_index_is_refused():
    """x[positions] would read other sequences' rows."""

    def body(emit, positions, x):
        ids = emit(relax.op.reshape(positions, relax.ShapeExpr([T])))
        return relax.op.take(x, ids, 1)

    refused(body, r"relax\.take", positions=POSITIONS, x=X)


def test_counting_along_the_packed_axis_is_refused():
    """Positions made by arange are wrong for every sequence of a batch but the first."""

    def body(emit, x):
        counted = emit(relax.op.arange(0, T, 1, "float32"))
        return relax.op.add(x, emit(relax.op.reshape(counted, relax.ShapeExpr([1, T, 1]))))

    refused(body, r"relax\.arange", x=X)


def test_mixing_the_gathered_rows_is_refused_too():
    refused(lambda emit, x: relax.op.nn.softmax(x, 1), r"relax\.nn\.softmax", x=[1, L, 8])


def test_choosing_the_best_tokens_of_an_expert_is_refused():
    def body(emit, x):
        scores = emit(relax.op.permute_dims(x, [1, 0]))
        return relax.TupleGetItem(emit(dialect.TopK(k=2).call(scores)), 0)

    refused(body, r"llmc\.top_k", x=[T, 4])


def test_an_operator_nobody_knows_is_refused():
    def body(emit, x):
        return relax.op.nn.instance_norm(x, *[relax.const([1.0] * 8, "float32")] * 2, 1, [2])

    refused(body, r"relax\.nn\.instance_norm", x=X)
