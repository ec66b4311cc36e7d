from dataclasses import dataclass, field

import pytest
import tvm
from graphs import L, T, graph, planned, settled
from tvm import relax
from tvm.ir import assert_structural_equal
from tvm.script import tirx as TIR

from llmc import dialect
from llmc.compiler import weight_plan
from llmc.compiler.passes.dispatch import MAX_TOKENS, RULE, dispatch
from llmc.compiler.weight_plan import WeightSpec
from llmc.errors import UnsupportedError
from llmc.targets.base import Kernel, PackedPart

S, B = (tvm.tirx.Var(n, "int64") for n in "SB")


@TIR.prim_func(s_tir=True)
def any_kernel(x_h: TIR.handle, y_h: TIR.handle):
    """Stands for every kernel: dispatch looks at its name only."""
    t = TIR.int64()
    x = TIR.match_buffer(x_h, (1, t, 8), "float32")
    y = TIR.match_buffer(y_h, (1, t, 8), "float32")
    for i, j in TIR.grid(t, 8):
        with TIR.sblock("copy"):
            vi, vj = TIR.axis.remap("SS", [i, j])
            y[0, vi, vj] = x[0, vi, vj]


def kernel(*operands, in_place=(None,)):
    return Kernel(func=any_kernel, rule="", operands=operands, in_place=in_place)


@dataclass
class Device:
    """A target of rules only; its weights are two arrays."""

    kernel_rules: list
    name: str = "toy"
    layout: str = "toy16"
    page_size: int = 16
    sites: list = field(default_factory=list)

    def packed_parts(self, fmt, shape):
        m, k = shape
        return [
            PackedPart(suffix="codes", shape=(m // 2, k), dtype="int32"),
            PackedPart(suffix="scales", shape=(m,), dtype="float16"),
        ]


def only(op_type, result):
    return lambda site: result if isinstance(site.op, op_type) else None


def step(body, formats=None, max_tokens=64, tokens=T, **params):
    """`body` as a function of the step's signature with a plan."""
    inputs = {
        "input_ids": ([tokens], "int32"),
        "positions": ([tokens], "int32"),
        "logits_rows": ([L], "int32"),
        "kv_lens": ([S], "int32"),
        "block_tables": ([3, S, B], "int32"),
    }
    mod = graph(body, **inputs, **params)
    # The order of lower_attention, for what dispatch reads: ids first, tables fifth.
    func = mod["main"]
    by_name = {p.name: p for p in func.params}
    names = ["input_ids", "positions", "logits_rows", "kv_lens", "block_tables", *params]
    func = relax.Function([by_name[n] for n in names], func.body, func.ret_ty, True, func.attrs)
    mod = tvm.IRModule({"main": func.with_attr(MAX_TOKENS, max_tokens)})
    specs = {n: WeightSpec(sources=[n], format=f) for n, f in (formats or {}).items()}
    return weight_plan.attach(mod, specs)


def calls(mod):
    """(kernel, names of its arguments) of every call_tir, in order."""
    found = []
    for binding in mod["main"].body.blocks[0].bindings:
        value = binding.value
        if isinstance(value, relax.Call) and "call_tir" in value.op.name:
            found.append((value.args[0].name_hint, [a.name for a in value.args[1].fields]))
    return found


def linear(emit, x, w, **inputs):
    return dialect.Linear(format="w8").call(x, w)


LINEAR = {"x": [1, T, 8], "w": [8, 8]}
PRODUCT = only(dialect.Linear, kernel("x", "weight"))


def test_a_product_calls_its_kernel_on_the_packed_arrays():
    after = dispatch(step(linear, {"w": "w8"}, **LINEAR), Device([("toy.gemm", PRODUCT)]))
    assert calls(after) == [("gemm_0", ["x", "w.codes", "w.scales"])]
    names = [p.name for p in after["main"].params]
    assert names[-3:] == ["x", "w.codes", "w.scales"]
    [codes] = [p for p in after["main"].params if p.name == "w.codes"]
    assert_structural_equal(codes.ty, relax.TensorType([4, 8], "int32"))


def test_the_plan_has_an_entry_for_each_packed_array():
    after = dispatch(step(linear, {"w": "w8"}, **LINEAR), Device([("toy.gemm", PRODUCT)]))
    spec = {"sources": ["w"], "format": "w8", "layout": "toy16"}
    assert weight_plan.weights_of(after) == {
        "w.codes": WeightSpec(part=0, **spec),
        "w.scales": WeightSpec(part=1, **spec),
    }


def test_the_module_is_the_expected_one():
    norm = only(dialect.RmsNorm, kernel("x", "weight"))

    def body(emit, x, w, **inputs):
        return dialect.RmsNorm(eps=1e-5).call(x, w)

    params = {"x": [1, T, 8], "w": [8]}
    before = step(body, {"w": "f32"}, **params)
    after = dispatch(before, Device([("toy.norm", norm)]))
    variable = tvm.ir.GlobalVar("norm_0")
    func = any_kernel.with_attr("global_symbol", "norm_0")
    relax.expr._update_type(variable, func.ty)
    expected = step(
        lambda emit, x, w, **inputs: relax.op.call_tir(variable, [x, w], out_ty=x.ty),
        {"w": "f32"},
        **params,
    )
    expected[variable] = func.with_attr(RULE, "toy.norm").with_attr("op_pattern", 8)
    assert_structural_equal(after, settled(expected), map_free_vars=True)


def test_the_first_rule_that_returns_a_kernel_wins_and_is_recorded():
    rules = [
        ("toy.never", lambda site: None),
        ("toy.first", PRODUCT),
        ("toy.second", PRODUCT),
    ]
    after = dispatch(step(linear, {"w": "w8"}, **LINEAR), Device(rules))
    assert str(after["first_0"].attrs[RULE]) == "toy.first"


def test_a_tied_matrix_is_packed_once():
    def body(emit, input_ids, w, **inputs):
        row = emit(relax.op.expand_dims(input_ids, 0))
        x = emit(dialect.Embedding(format="w8").call(row, w))
        return dialect.Linear(format="w8").call(x, w)

    device = Device(
        [("toy.table", only(dialect.Embedding, kernel("ids", "weight"))), ("toy.gemm", PRODUCT)]
    )
    after = dispatch(step(body, {"w": "w8"}, w=[8, 8]), device)
    [(_, table), (_, product)] = calls(after)
    assert table[1:] == product[1:] == ["w.codes", "w.scales"]
    assert [p.name for p in after["main"].params][-2:] == ["w.codes", "w.scales"]


def test_equal_sites_share_a_kernel_and_others_do_not():
    def body(emit, x, a, b, c, **inputs):
        op = dialect.Linear(format="w8")
        return op.call(emit(op.call(emit(op.call(x, a)), b)), c)

    params = {"x": [1, T, 8], "a": [8, 8], "b": [8, 8], "c": [6, 8]}
    mod = step(body, dict.fromkeys("abc", "w8"), **params)
    after = dispatch(mod, Device([("toy.gemm", PRODUCT)]))
    assert [name for name, _ in calls(after)] == ["gemm_0", "gemm_0", "gemm_1"]


def test_a_rule_sees_shapes_tokens_and_bounds():
    seen = []

    def look(site):
        seen.append(site)
        return kernel("x", "weight")

    one = {"x": [1, 1, 8], "w": [8, 8]}
    dispatch(step(linear, {"w": "w8"}, **LINEAR), Device([("toy.gemm", look)]))
    dispatch(step(linear, {"w": "w8"}, max_tokens=1, tokens=1, **one), Device([("toy.g", look)]))
    many, single = seen
    assert (many.tokens, many.max_tokens, many.num_groups, many.page_size) == (None, 64, 3, 16)
    assert (single.tokens, single.max_tokens) == (1, 1)
    assert many.extents("x") == [1, 0, 8]  # a symbolic extent is 0
    assert many.extents("weight") == [8, 8]  # the matrix, not what it is packed into


def test_what_a_kernel_overwrites_is_a_call_in_place():
    def body(emit, x, k_pages, v_pages, slots, **inputs):
        write = dialect.KvWrite(group=0)
        pair = emit(write.call(x, x, slots, k_pages, v_pages))
        return relax.TupleGetItem(pair, 1)

    order = dialect.KvWrite.operands
    rule = only(dialect.KvWrite, kernel(*order, in_place=("k_pages", "v_pages")))
    params = {"k_pages": [9, 4], "v_pages": [9, 2], "slots": ([3, T], "int32")}
    mod = step(body, x=[1, T, 2, 4], **params)
    after = dispatch(mod, Device([("toy.kv_write", rule)]))
    [call] = [
        b.value
        for b in after["main"].body.blocks[0].bindings
        if isinstance(b.value, relax.Call) and b.value.op.name == "relax.call_tir_inplace"
    ]
    assert [int(i) for i in call.attrs.inplace_indices] == [3, 4]


def _ends(emit, h, x, product):
    return product(x, h)


def _is_multiplied(emit, h, x, product):
    return product(h, h)


def _is_read_later(emit, h, x, product):
    return emit(dialect.RmsNorm(eps=1e-5).call(emit(product(x, h)), h))


def _is_shown_later(emit, h, x, product):
    flat = emit(relax.op.reshape(h, relax.ShapeExpr([1, T, 2, 4])))
    y = emit(product(x, h))
    return emit(relax.op.add(emit(relax.op.reshape(flat, y.ty.shape)), y))


def _is_read_by_what_may_be_fused(emit, h, x, product):
    twice = emit(relax.op.add(h, h))
    return emit(relax.op.add(emit(product(x, h)), twice))


def _is_not_the_step_s_own(emit, h, x, product):
    return product(h, x)


@pytest.mark.parametrize(
    ("body", "ends"),
    [
        (_ends, True),
        (_is_multiplied, False),
        (_is_read_later, False),
        (_is_shown_later, False),
        (_is_read_by_what_may_be_fused, False),
        (_is_not_the_step_s_own, False),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_rule_sees_whether_the_residual_may_be_overwritten(body, ends):
    seen = []

    def look(site):
        seen.append(site.residual_ends)
        return kernel("x", "weight", "residual")

    def whole(emit, input_ids, x, w, **inputs):
        h = emit(dialect.Embedding(format="w8").call(emit(relax.op.expand_dims(input_ids, 0)), w))
        op = dialect.Linear(format="w8")
        return body(emit, h, x, lambda a, residual: op.call(a, w, residual=residual))

    rules = [
        ("toy.table", only(dialect.Embedding, kernel("ids", "weight"))),
        ("toy.norm", only(dialect.RmsNorm, kernel("x", "weight"))),
        ("toy.gemm", look),
    ]
    dispatch(step(whole, {"w": "w8"}, **LINEAR), Device(rules))
    assert seen == [ends]


def test_an_operator_without_a_kernel_is_refused_by_name_and_shape():
    with pytest.raises(
        UnsupportedError, match=r"target toy has no kernel for operator linear on .*'x'"
    ):
        dispatch(step(linear, {"w": "w8"}, **LINEAR), Device([("toy.never", lambda site: None)]))
