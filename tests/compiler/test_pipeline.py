import pytest
import tvm
from graphs import INPUTS, T, graph
from tvm import relax

from llmc import dialect
from llmc.compiler import weight_plan
from llmc.compiler.pipeline import StepBounds, from_trace, graph_phases
from llmc.compiler.schemes import scheme_of
from llmc.errors import UnsupportedError
from llmc.models.trace import Trace
from llmc.targets.registry import open_target

USED = {n: INPUTS[n] for n in ("input_ids", "logits_rows")}
BOUNDS = StepBounds(max_tokens=16, max_sequences=4, max_logits_rows=4)


def run_until(name, mod):
    """The module after the phase `name`."""
    choose = scheme_of("f32").choose({})
    phases = graph_phases(open_target("cpu"), choose, "float32", "float32", BOUNDS)
    for phase, apply in phases:
        mod = apply(mod)
        if phase == name:
            return mod
    raise KeyError(name)


def traced(body, tensors=None, **params):
    """A trace of `body`; `tensors` names the model's tensor of a parameter where it is another."""
    mod = graph(body, **params)
    names = [p.name for p in mod["main"].params[len(INPUTS) :]]
    given = {n: (tensors or {}).get(n, n) for n in names}
    return Trace(module=mod, parameters=given, num_parameters=0)


def product(emit, input_ids, logits_rows, table, head):
    h = emit(dialect.Embedding().call(input_ids, table))
    h = emit(relax.op.take(h, logits_rows, 1, mode="clip"))
    return dialect.Linear().call(h, head)


def test_arguments_that_are_one_tensor_of_the_model_become_one():
    trace = traced(
        product, {"head": "embed", "table": "embed"}, **USED, table=[50, 8], head=[50, 8]
    )
    mod = from_trace(trace)
    params = [p.name for p in mod["main"].params]
    assert params == [*INPUTS, "table"]
    assert weight_plan.weights_of(mod)["table"].sources == ["embed"]
    found = [dialect.match_any(b.value) for b in mod["main"].body.blocks[0].bindings]
    assert {f.operands["weight"].name for f in found if f} == {"table"}


def test_arguments_that_nothing_reads_are_dropped():
    def body(emit, input_ids, table, unused):
        return dialect.Embedding().call(input_ids, table)

    mod = from_trace(traced(body, input_ids=USED["input_ids"], table=[50, 8], unused=[4]))
    assert list(weight_plan.weights_of(mod)) == ["table"]


def plain_program(emit, input_ids, logits_rows, table, head):
    """An attention that repeats its keys, as a program without this dialect writes it."""
    h = emit(dialect.Embedding().call(input_ids, table))
    query = emit(relax.op.reshape(h, relax.ShapeExpr([1, T, 2, 4])))
    key = emit(
        relax.op.permute_dims(emit(relax.op.strided_slice(query, [2], [0], [1])), [0, 2, 1, 3])
    )
    wide = emit(relax.op.broadcast_to(
        emit(relax.op.expand_dims(key, 2)), relax.ShapeExpr([1, 1, 2, T, 4])
    ))  # fmt: skip
    both = emit(relax.op.reshape(wide, relax.ShapeExpr([1, 2, T, 4])))
    rows = emit(relax.op.permute_dims(both, [0, 2, 1, 3]))
    mixed = emit(relax.op.nn.attention(query, rows, rows, causal_mask="TopLeft"))
    h = emit(relax.op.reshape(mixed, relax.ShapeExpr([1, T, 8])))
    h = emit(relax.op.take(h, logits_rows, 1, mode="clip"))
    return dialect.Linear().call(h, head)


def test_attention_of_a_plain_program_is_recognized_before_mixing_is_refused():
    mod = from_trace(traced(plain_program, **USED, table=[50, 8], head=[50, 8]))
    after = run_until("paged-attention", mod)
    [page] = [p for p in after["step"].params if p.name == "k_pages_0"]
    assert int(page.ty.shape[1]) == 1  # one key head, shared by both query heads


def test_a_model_that_mixes_tokens_is_refused_before_it_is_quantized():
    def body(emit, input_ids, table):
        h = emit(dialect.Embedding().call(input_ids, table))
        return relax.op.cumsum(h, 1)

    mod = from_trace(traced(body, input_ids=USED["input_ids"], table=[50, 8]))
    with pytest.raises(UnsupportedError, match=r"relax\.cumsum"):
        run_until("rewrite-gqa", mod)


def test_entry_points_call_kernels_only():
    """After the last phase no operator of the dialect, nor any of Relax that computes, is left."""
    mod = from_trace(traced(plain_program, **USED, table=[50, 8], head=[50, 8]))
    with open_target("cpu").tvm_target:
        after = run_until("fuse-rest", mod)
    calls = {
        b.value.op.name
        for g, f in after.functions_items()
        if isinstance(f, relax.Function)
        for block in f.body.blocks
        for b in block.bindings
        if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.Op)
    }
    views = {"relax.reshape", "relax.call_pure_packed"}
    assert calls <= {"relax.call_tir", "relax.call_tir_inplace", *views}
