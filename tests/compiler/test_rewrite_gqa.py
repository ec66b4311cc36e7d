import pytest
from graphs import T, assert_becomes, assert_idempotent, assert_unchanged, graph
from interpreter import assert_same_numbers
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.check_packing import check_packing
from llmc.compiler.passes.rewrite_gqa import rewrite_gqa

HEADS = {"q": [1, 6, T, 8], "k": [1, 2, T, 8], "v": [1, 2, T, 4]}
ROWS = {"q": [1, T, 6, 8], "k": [1, T, 6, 8], "v": [1, T, 6, 8]}
OP = dialect.Attention(layer=0, scale=0.25)


def spread(emit, x, times, axis=2):
    """repeat_kv of transformers: each head `times` in a row."""
    batch, heads, tokens, size = x.ty.shape
    wide = emit(relax.op.expand_dims(x, axis))
    shape = [batch, heads, tokens, size]
    shape.insert(axis, times)
    wide = emit(relax.op.broadcast_to(wide, relax.ShapeExpr(shape)))
    return emit(relax.op.reshape(wide, relax.ShapeExpr([batch, heads * times, tokens, size])))


def transposed(emit, x):
    return emit(relax.op.permute_dims(x, [0, 2, 1, 3]))


def grouped(emit, q, k, v):
    return OP.call(q, k, v)


def test_heads_repeated_by_broadcasting_are_shared():
    before = graph(
        lambda emit, q, k, v: OP.call(q, spread(emit, k, 3), spread(emit, v, 3)), **HEADS
    )
    assert_becomes(rewrite_gqa, before, graph(grouped, **HEADS))
    assert_idempotent(rewrite_gqa, before)
    assert_same_numbers(before, rewrite_gqa(before))


def test_heads_repeated_by_repeat_are_shared():
    def body(emit, q, k, v):
        return OP.call(q, *(emit(relax.op.repeat(x, 3, 1)) for x in (k, v)))

    before = graph(body, **HEADS)
    assert_becomes(rewrite_gqa, before, graph(grouped, **HEADS))
    assert_same_numbers(before, rewrite_gqa(before))


def test_heads_repeated_in_turns_are_not_the_same_thing():
    """k0 k1 k0 k1… (tile) gives every query another head than k0 k0 k1 k1…"""

    def body(emit, q, k, v):
        return OP.call(q, spread(emit, k, 3, axis=1), spread(emit, v, 3, axis=1))

    assert_unchanged(rewrite_gqa, graph(body, **HEADS))


def test_keys_and_values_repeated_unequally_stay():
    def body(emit, q, k, v):
        return OP.call(q, spread(emit, k, 3), spread(emit, v, 2))

    assert_unchanged(rewrite_gqa, graph(body, q=[1, 6, T, 8], k=[1, 2, T, 8], v=[1, 3, T, 4]))


def test_repeating_along_the_tokens_stays():
    def body(emit, q, k, v):
        return OP.call(q, *(emit(relax.op.repeat(x, 3, 2)) for x in (k, v)))

    assert_unchanged(rewrite_gqa, graph(body, **HEADS))


def test_attention_of_plain_programs_becomes_ours():
    def before(emit, q, k, v):
        return relax.op.nn.attention(q, k, v, causal_mask="TopLeft")

    def expected(emit, q, k, v):
        op = dialect.Attention(layer=0, scale=8**-0.5)
        return op.call(*(transposed(emit, x) for x in (q, k, v)))

    assert_becomes(rewrite_gqa, graph(before, **ROWS), graph(expected, **ROWS))


def test_each_layer_gets_its_number_and_its_scale():
    def before(emit, q, k, v):
        first = emit(relax.op.nn.attention(q, k, v, causal_mask="TopLeft"))
        return relax.op.nn.attention(first, k, v, causal_mask="TopLeft", scale=0.5)

    found = [
        dialect.Attention.match(b.value)
        for b in rewrite_gqa(graph(before, **ROWS))["main"].body.blocks[0].bindings
    ]
    ops = [f[0] for f in found if f]
    assert [(op.layer, op.scale) for op in ops] == [(0, 8**-0.5), (1, 0.5)]


def test_repeated_heads_are_found_behind_the_transposition_that_attention_wants():
    """scaled_dot_product_attention has heads first, nn.attention tokens first."""

    def before(emit, q, k, v):
        wide = [q, spread(emit, k, 3), spread(emit, v, 3)]
        rows = [transposed(emit, x) for x in wide]
        return relax.op.nn.attention(*rows, causal_mask="TopLeft", scale=0.25)

    mod = graph(before, **HEADS)
    assert_becomes(rewrite_gqa, mod, graph(grouped, **HEADS))
    check_packing(rewrite_gqa(mod))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal_mask": "BottomRight"},
        {"causal_mask": "TopLeft", "window_size": 4},
    ],
)
def test_attention_that_is_not_plainly_causal_stays(options):
    body = lambda emit, q, k, v: relax.op.nn.attention(q, k, v, **options)  # noqa: E731
    assert_unchanged(rewrite_gqa, graph(body, **ROWS))


def test_attention_with_a_bias_stays():
    def body(emit, q, k, v, bias):
        return relax.op.nn.attention(q, k, v, bias, causal_mask="TopLeft")

    assert_unchanged(rewrite_gqa, graph(body, **ROWS, bias=[1, 6, T, T]))


def test_attention_to_keys_of_another_length_stays():
    body = lambda emit, q, k, v: relax.op.nn.attention(q, k, v, causal_mask="TopLeft")  # noqa: E731
    other = [1, 16, 6, 8]
    assert_unchanged(rewrite_gqa, graph(body, q=[1, T, 6, 8], k=other, v=other))
