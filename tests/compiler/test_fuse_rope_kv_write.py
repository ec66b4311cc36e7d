import pytest
import tvm
from graphs import T, assert_becomes, assert_idempotent, assert_unchanged, graph
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.fuse_rope_kv_write import fuse_rope_kv_write

H, KV, D, DV = 4, 2, 8, 6
WIDTHS = (H * D, KV * D, KV * DV)
S, B, P = (tvm.tirx.Var(n, "int64") for n in "SBP")
PARAMS = {
    "qkv": [1, T, sum(WIDTHS)],
    "cos": [1, T, D],
    "sin": [1, T, D],
    "slots": ([1, T], "int32"),
    "q_starts": ([S + 1], "int32"),
    "kv_lens": ([S], "int32"),
    "block_tables": ([1, S, B], "int32"),
    "k_pages": [P, KV, D, 16],
    "v_pages": [P, KV, 16, DV],
}
PAGED = dialect.PagedAttention(group=0, scale=0.5, v_head_dim=DV)
ROPE = dialect.Rope(rotary_dim=D)


def heads(emit, qkv, begin, count, size):
    piece = emit(relax.op.strided_slice(qkv, [2], [begin], [begin + count * size]))
    return emit(relax.op.reshape(piece, relax.ShapeExpr([1, T, count, size])))


def three(emit, qkv):
    """query, key and value of a fused projection, in this order."""
    begins = (0, WIDTHS[0], WIDTHS[0] + WIDTHS[1])
    counts = ((H, D), (KV, D), (KV, DV))
    return [heads(emit, qkv, b, *c) for b, c in zip(begins, counts, strict=True)]


def attend(emit, query, key, value, given):
    tables = [given[n] for n in ("q_starts", "kv_lens", "block_tables")]
    write = dialect.KvWrite(group=0)
    written = emit(write.call(key, value, given["slots"], given["k_pages"], given["v_pages"]))
    pages = [emit(relax.TupleGetItem(written, i)) for i in range(2)]
    return PAGED.call(query, *tables, *pages, None)


def separate(emit, qkv, cos, sin, **given):
    query, key, value = three(emit, qkv)
    query, key = (emit(ROPE.call(x, cos, sin)) for x in (query, key))
    return attend(emit, query, key, value, given)


def fused(emit, qkv, cos, sin, slots, k_pages, v_pages, **given):
    op = dialect.RopeKvWrite(
        group=0, num_heads=H, num_kv_heads=KV, head_dim=D, v_head_dim=DV, rotary_dim=D
    )
    made = emit(op.call(qkv, cos, sin, slots, k_pages, v_pages))
    query, k_pages, v_pages = (emit(relax.TupleGetItem(made, i)) for i in range(3))
    tables = [given[n] for n in ("q_starts", "kv_lens", "block_tables")]
    return PAGED.call(query, *tables, k_pages, v_pages, None)


def test_rotation_and_writing_of_a_fused_projection_are_one_operator():
    before = graph(separate, **PARAMS)
    assert_becomes(fuse_rope_kv_write, before, graph(fused, **PARAMS))
    assert_idempotent(fuse_rope_kv_write, before)


def key_normalized(emit, qkv, cos, sin, **given):
    query, key, value = three(emit, qkv)
    key = emit(relax.op.nn.relu(key))
    query, key = (emit(ROPE.call(x, cos, sin)) for x in (query, key))
    return attend(emit, query, key, value, given)


def key_not_rotated(emit, qkv, cos, sin, **given):
    query, key, value = three(emit, qkv)
    return attend(emit, emit(ROPE.call(query, cos, sin)), key, value, given)


def other_tables_for_the_key(emit, qkv, cos, sin, **given):
    query, key, value = three(emit, qkv)
    query = emit(ROPE.call(query, cos, sin))
    key = emit(ROPE.call(key, sin, cos))
    return attend(emit, query, key, value, given)


def part_of_the_key_rotated(emit, qkv, cos, sin, **given):
    query, key, value = three(emit, qkv)
    query = emit(ROPE.call(query, cos, sin))
    key = emit(dialect.Rope(rotary_dim=4).call(key, cos, sin))
    return attend(emit, query, key, value, given)


def value_from_elsewhere(emit, qkv, cos, sin, **given):
    query, key, value = three(emit, qkv)
    other = emit(relax.op.negative(qkv))
    *_, value = three(emit, other)
    query, key = (emit(ROPE.call(x, cos, sin)) for x in (query, key))
    return attend(emit, query, key, value, given)


def value_before_key(emit, qkv, cos, sin, **given):
    query = heads(emit, qkv, 0, H, D)
    value = heads(emit, qkv, WIDTHS[0], KV, DV)
    key = heads(emit, qkv, WIDTHS[0] + WIDTHS[2], KV, D)
    query, key = (emit(ROPE.call(x, cos, sin)) for x in (query, key))
    return attend(emit, query, key, value, given)


@pytest.mark.parametrize(
    "body",
    [
        key_normalized,
        key_not_rotated,
        other_tables_for_the_key,
        part_of_the_key_rotated,
        value_from_elsewhere,
        value_before_key,
    ],
)
def test_other_layers_keep_their_separate_operators(body):
    assert_unchanged(fuse_rope_kv_write, graph(body, **PARAMS))


def test_a_projection_with_more_than_query_key_and_value_is_left_alone():
    wider = {**PARAMS, "qkv": [1, T, sum(WIDTHS) + 8]}
    assert_unchanged(fuse_rope_kv_write, graph(separate, **wider))
