import numpy as np
import pytest
import tvm
from graphs import T, graph
from tvm import relax

from llmc.compiler.passes.plan_memory import PLANNED_BYTES, plan_memory, pooled_bytes
from llmc.compiler.pipeline import lower_memory, lower_to_vm
from llmc.compiler.rewriter import bindings, op_args

PAGE = 4096


def called(mod, **bounds):
    """`mod` up to the point where memory is planned, its functions bounded."""
    for name, func in mod.functions_items():
        if isinstance(func, relax.Function) and bounds:
            mod[name] = func.with_attr("tir_var_upper_bound", bounds)
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
    ]
    return tvm.transform.Sequential(passes)(mod)


def storages(mod, name="main"):
    found = [op_args(b.value, "relax.memory.alloc_storage") for b in bindings(mod[name])]
    return sorted((int(args[0].values[0]) for args in found if args), reverse=True)


def waves(emit, x):
    """Narrow and wide tensors in turns: T rows of 1, 100, 2, 100, 1."""
    for width in (100, 2, 100, 1):
        rows = relax.ShapeExpr([T, width])
        x = emit(relax.op.broadcast_to(emit(relax.op.sum(x, axis=1, keepdims=True)), rows))
    return emit(relax.op.add(x, x))


def test_a_large_place_is_made_once_whatever_comes_first():
    planned = plan_memory(called(graph(waves, x=[T, 1]), T=64))
    sums, wide, narrow = 64 * 4, 64 * 100 * 4, 64 * 2 * 4
    # While a wide tensor is summed, it and the sum are there; then the sum and a narrow one.
    assert storages(planned) == [wide, sums]
    assert narrow < wide
    assert planned["main"].attrs[PLANNED_BYTES] == wide + sums + 64 * 4  # and the result
    tvm_plan = relax.transform.StaticPlanBlockMemory()(called(graph(waves, x=[T, 1]), T=64))
    assert sum(storages(tvm_plan)) > wide + sums


@pytest.mark.parametrize("at_bounds", [False, True])
def test_numbers_are_those_of_the_program_and_results_stay(at_bounds):
    mod = relax.transform.LegalizeOps()(graph(waves, x=[T, 1]))
    mod["main"] = mod["main"].with_attr("tir_var_upper_bound", {"T": 64})
    lowered = lower_memory(lower_to_vm(mod, results_at_bounds=at_bounds))
    executable = relax.build(lowered, target="llvm", relax_pipeline=None)
    run = relax.VirtualMachine(executable, tvm.cpu())["main"]

    def wave(rows, factor):
        x = np.arange(rows, dtype=np.float32).reshape(-1, 1) * factor
        ids = tvm.runtime.tensor(np.zeros((1, rows), np.int32))
        return run(ids, ids, tvm.runtime.tensor(np.zeros(1, np.int32)), tvm.runtime.tensor(x))

    first, second, third = wave(64, 1), wave(64, 3), wave(5, 1)
    expected = np.arange(64, dtype=np.float32).reshape(-1, 1) * 100 * 2 * 100 * 2
    np.testing.assert_allclose(first.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(second.numpy(), 3 * expected, rtol=1e-6)
    np.testing.assert_allclose(third.numpy(), expected[:5], rtol=1e-6)


def test_results_have_one_size_whatever_their_rows():
    mod = called(graph(waves, x=[T, 1]), T=64)
    loose, bound = plan_memory(mod), plan_memory(mod, results_at_bounds=True)
    assert storages(bound) == sorted([*storages(loose), 64 * 4], reverse=True)
    left = [op_args(b.value, "relax.builtin.alloc_tensor") for b in bindings(loose["main"])]
    assert len([args for args in left if args]) == 1


def twice(rows, width):
    x = relax.Var("x", relax.TensorType([rows, width], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.add(x, x))
            z = builder.emit(relax.op.add(builder.emit(relax.op.multiply(y, y)), y))
            z = builder.emit_output(relax.op.sum(z))
        builder.emit_func_output(z)
    return builder.get()["main"]


def test_functions_share_their_places_rank_by_rank():
    few, many = twice(8, 64), twice(1024, 64)
    mod = called(tvm.IRModule({"few": few, "many": many}))
    alone = plan_memory(called(tvm.IRModule({"main": twice(8, 64)})))
    planned = plan_memory(mod)
    assert storages(planned, "few") == storages(planned, "many")
    own = [int(planned[name].attrs[PLANNED_BYTES]) for name in ("few", "many")]
    assert own == [alone["main"].attrs[PLANNED_BYTES], sum(storages(planned, "many")) + 4]
    assert own[0] < own[1]
    # The result of both, a number, takes a page of the pool.
    assert pooled_bytes(planned) == sum(storages(planned, "many")) + PAGE


def test_a_result_lives_on_while_other_functions_run():
    def step(emit, x):
        return emit(relax.op.concat([emit(relax.op.add(x, x))] * 2))

    def choose(emit, x):
        return emit(relax.op.add(x, x))

    graphs = {"step": graph(step, x=[PAGE // 4]), "choose": graph(choose, x=[PAGE // 4])}
    mod = tvm.IRModule({name: mod["main"] for name, mod in graphs.items()})
    # What `choose` returns is held when `step` needs as much for itself.
    assert pooled_bytes(plan_memory(called(mod))) == PAGE + 2 * PAGE + PAGE


def test_what_has_no_bound_is_left_alone():
    planned = plan_memory(called(graph(waves, x=[T, 1])))
    assert storages(planned) == []
    assert PLANNED_BYTES in planned["main"].attrs


def test_what_a_view_or_a_tuple_still_shows_keeps_its_place():
    def body(emit, x):
        a = emit(relax.op.add(x, x))
        flat = emit(relax.op.reshape(a, relax.ShapeExpr([64])))
        both = emit(relax.Tuple([flat, x]))
        b = emit(relax.op.multiply(x, x))  # must not overwrite a
        seen = emit(relax.op.reshape(emit(both[0]), relax.ShapeExpr([8, 8])))
        return emit(relax.op.sum(emit(relax.op.add(seen, b))))

    mod = relax.transform.LegalizeOps()(graph(body, x=[8, 8]))
    executable = relax.build(lower_memory(lower_to_vm(mod)), target="llvm", relax_pipeline=None)
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    ids = tvm.runtime.tensor(np.zeros((1, 4), np.int32))
    rows = tvm.runtime.tensor(np.zeros(1, np.int32))
    found = relax.VirtualMachine(executable, tvm.cpu())["main"](
        ids, ids, rows, tvm.runtime.tensor(x)
    )
    assert found.numpy() == (2 * x + x * x).sum()
