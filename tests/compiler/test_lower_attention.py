import pytest
import tvm
from graphs import INPUTS, L, T, graph, planned, settled
from tvm import relax
from tvm.ir import assert_structural_equal

from llmc import dialect
from llmc.compiler import weight_plan
from llmc.compiler.passes.lower_attention import Cache, Page, caches_of, lower_attention
from llmc.compiler.pipeline import StepBounds, graph_phases
from llmc.compiler.schemes import scheme_of
from llmc.errors import UnsupportedError
from llmc.targets.cpu.target import CpuTarget

PAGE_SIZE = 16
USED = {n: INPUTS[n] for n in ("input_ids", "logits_rows")}
S, B, P0, P1 = (tvm.tirx.Var(n, "int64") for n in ("S", "B", "P0", "P1"))


def page(kv_heads, head_dim, v_head_dim, page_size):
    return Page(key=[kv_heads, head_dim, page_size], value=[kv_heads, page_size, v_head_dim])


def lower(mod):
    return lower_attention(mod, page_size=PAGE_SIZE, kv_dtype="float16", page_layout=page)


def layer(emit, x, number, window=None):
    """One layer whose query, key and value are slices of x `[1, 4, T, 8]`."""
    op = dialect.Attention(layer=number, scale=0.5, window=window, softcap=30.0)
    key = emit(relax.op.strided_slice(x, [1], [0], [2]))
    value = emit(relax.op.strided_slice(key, [3], [0], [6]))
    return emit(op.call(x, key, value))


def model(windows, numbers=None):
    def body(emit, logits_rows, x):
        rows = x
        for index, window in enumerate(windows):
            out = layer(emit, rows, index if numbers is None else numbers[index], window)
            wide = emit(relax.op.concat([out, emit(relax.op.strided_slice(out, [3], [0], [2]))], 3))
            rows = emit(relax.op.permute_dims(wide, [0, 2, 1, 3]))
        flat = emit(relax.op.permute_dims(rows, [0, 2, 1, 3]))
        flat = emit(relax.op.reshape(flat, relax.ShapeExpr([1, T, 32])))
        return relax.op.take(flat, logits_rows, 1, mode="clip")

    return planned(graph(body, logits_rows=INPUTS["logits_rows"], x=[1, 4, T, 8]))


def parameters(mod):
    return [p.name for p in mod["step"].params]


def expected_of_one_layer():
    def tensor(name, shape, dtype="int32"):
        return relax.Var(name, relax.TensorType(shape, dtype))

    names = ("num_decodes", "max_q_len", "max_kv_len")
    params = [
        tensor("input_ids", [T]),
        tensor("positions", [T]),
        tensor("q_starts", [S + 1]),
        tensor("kv_lens", [S]),
        tensor("block_tables", [1, S, B]),
        tensor("slots", [1, T]),
        tensor("state_slots", [S]),
        tensor("logits_rows", [L]),
        relax.Var("host", relax.ShapeType([tvm.tirx.Var(n, "int64") for n in names])),
        tensor("k_pages_0", [P0, 2, 8, PAGE_SIZE], "float16"),
        tensor("v_pages_0", [P0, 2, PAGE_SIZE, 6], "float16"),
        tensor("x", [1, 4, T, 8], "float32"),
    ]
    given = {p.name: p for p in params}
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        for name in ("input_ids", "positions"):
            builder.emit(relax.op.reshape(given[name], relax.ShapeExpr([1, T])))
        with builder.dataflow():
            last = builder.emit_output(paged(builder.emit, **given))
        out = builder.emit(relax.op.reshape(last, relax.ShapeExpr([L, 32])))
        builder.emit_func_output(out)
    return builder.get()["main"].with_attr("global_symbol", "step")


def paged(emit, x, slots, q_starts, kv_lens, block_tables, k_pages_0, v_pages_0, **other):
    key = emit(relax.op.strided_slice(x, [1], [0], [2]))
    value = emit(relax.op.strided_slice(key, [3], [0], [6]))
    rows = [emit(relax.op.permute_dims(v, [0, 2, 1, 3])) for v in (x, key, value)]
    write = dialect.KvWrite(group=0)
    written = emit(write.call(rows[1], rows[2], slots, k_pages_0, v_pages_0))
    pages = [emit(relax.TupleGetItem(written, i)) for i in range(2)]
    op = dialect.PagedAttention(group=0, scale=0.5, v_head_dim=6, softcap=30.0)
    out = emit(op.call(rows[0], q_starts, kv_lens, block_tables, *pages, None))
    wide = emit(relax.op.concat([out, emit(relax.op.strided_slice(out, [3], [0], [2]))], 3))
    rows = emit(relax.op.permute_dims(wide, [0, 2, 1, 3]))
    flat = emit(relax.op.permute_dims(rows, [0, 2, 1, 3]))
    flat = emit(relax.op.reshape(flat, relax.ShapeExpr([1, T, 32])))
    return relax.op.take(flat, other["logits_rows"], 1, mode="clip")


def test_the_function_gets_the_step_signature_and_attention_reads_what_was_written():
    after = lower(model([None]))
    # The first and last lines get their types from the next pass, whichever it is.
    wanted = settled(tvm.IRModule({"step": expected_of_one_layer()}))
    assert_structural_equal(settled(after)["step"], wanted["step"], map_free_vars=True)
    relax.analysis.well_formed(settled(after))  # raises


def test_caches_are_described_in_the_order_of_the_arguments():
    after = lower(model([None, None]))
    found = caches_of(after)
    assert found.windows == [None]
    assert found.tensors[1] == Cache(
        name="v_pages_0", layer=0, group=0, dtype="float16", page_shape=[2, 16, 6]
    )
    names = [c.name for c in found.tensors]
    assert names == ["k_pages_0", "v_pages_0", "k_pages_1", "v_pages_1"]
    assert parameters(after)[9:] == [*names, "x"]


def test_layers_of_one_window_share_a_group_and_its_number_of_pages():
    after = lower(model([4, None, 4]))
    found = caches_of(after)
    assert found.windows == [4, None]
    assert [c.group for c in found.tensors] == [0, 0, 1, 1, 0, 0]
    params = {p.name: list(p.ty.shape) for p in after["step"].params if p.name != "host"}
    assert int(params["block_tables"][0]) == 2
    assert int(params["slots"][0]) == 2
    pages = [params[f"k_pages_{i}"][0] for i in range(3)]
    assert pages[0].same_as(pages[2])
    assert not pages[0].same_as(pages[1])
    assert [(op.group, op.window) for op in layers(after)] == [(0, 4), (1, None), (0, 4)]


def layers(mod):
    """The attention operators of a lowered module."""
    found = (
        dialect.PagedAttention.match(binding.value)
        for block in mod["step"].body.blocks
        for binding in block.bindings
    )
    return [match[0] for match in found if match]


@pytest.mark.parametrize(
    ("activations", "factors"), [("float32", None), ("int8", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_attention_multiplies_rounded_numbers_where_other_products_do(activations, factors):
    bounds = StepBounds(max_tokens=16, max_sequences=4, max_logits_rows=4)
    choose = scheme_of("f32").choose({})
    phases = graph_phases(CpuTarget("amx"), choose, activations, "float16", bounds)
    after = dict(phases)["paged-attention"](model([None]))
    assert [op.factors for op in layers(after)] == [factors]


def test_the_weight_plan_travels_along():
    mod = model([None])
    assert weight_plan.weights_of(lower(mod)) == weight_plan.weights_of(mod)


def test_a_layer_that_attends_twice_is_refused():
    with pytest.raises(UnsupportedError, match=r"layers \[3\] attend more than once"):
        lower(model([None, None], numbers=[3, 3]))


def test_heads_of_unknown_size_are_refused():
    size = tvm.tirx.Var("D", "int64")

    def body(emit, x):
        return dialect.Attention(layer=5, scale=1.0).call(x, x, x)

    with pytest.raises(UnsupportedError, match="layer 5 has no fixed head size"):
        lower(planned(graph(body, x=[1, 4, T, size])))
