import numpy as np
import pytest
import tvm
from graphs import T, graph
from tvm import relax

from llmc.compiler.passes.share_tensors import share_tensors
from llmc.compiler.pipeline import lower_memory, lower_to_vm
from llmc.compiler.rewriter import bindings, op_args

LAYERS = 5
ROWS = {"static": 4, "symbolic": T}


def layers(emit, x, w):
    """Each layer swaps the halves of its features, and scales them seen as another shape."""
    rows = x.ty.shape[0]
    for _ in range(LAYERS):
        halves = emit(relax.op.split(x, 2, axis=1))
        x = emit(relax.op.concat([emit(halves[1]), emit(halves[0])], axis=1))
        pairs = emit(relax.op.reshape(x, relax.ShapeExpr([rows, 3, 2])))
        pairs = emit(relax.op.multiply(pairs, w))
        x = emit(relax.op.reshape(pairs, relax.ShapeExpr([rows, 6])))
    return emit(relax.op.add(x, x))


def planned(rows):
    mod = relax.transform.LegalizeOps()(graph(layers, x=[rows, 6], w=[3, 2]))
    mod = relax.transform.RewriteDataflowReshape()(mod)
    mod["main"] = mod["main"].with_attr("tir_var_upper_bound", {"T": 8})
    return lower_to_vm(mod)


def allocations(mod):
    return [b.value for b in bindings(mod["main"]) if op_args(b.value, "relax.memory.alloc_tensor")]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_place_of_one_shape_is_one_tensor_in_all_layers(rows):
    found = allocations(planned(rows))
    storages = list({a.args[0] for a in found})
    places = [(storages.index(a.args[0]), str(a.args[2]), str(a.args[3])) for a in found]
    assert len(places) == len(set(places))
    assert len(places) < LAYERS * 3


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_no_tuple_and_no_view_of_planned_memory_is_left(rows):
    values = [b.value for b in bindings(planned(rows)["main"])]
    assert not [v for v in values if isinstance(v, relax.Tuple | relax.TupleGetItem)]
    assert not [v for v in values if op_args(v, "relax.reshape")]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_numbers_are_those_of_the_program(rows):
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    w = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    executable = relax.build(lower_memory(planned(rows)), target="llvm", relax_pipeline=None)
    ids = np.zeros((1, 4), np.int32)
    given = [tvm.runtime.tensor(a) for a in (ids, ids, np.zeros(1, np.int32), x, w)]
    found = relax.VirtualMachine(executable, tvm.cpu())["main"](*given).numpy()
    for _ in range(LAYERS):
        x = (np.roll(x, 3, axis=1).reshape(4, 3, 2) * w).reshape(4, 6)
    np.testing.assert_array_equal(found, x + x)  # the same operations in the same order


def test_what_a_function_returns_as_a_tuple_stays_one():
    def both(emit, x):
        twice = emit(relax.op.add(x, x))
        return emit(relax.Tuple([twice, emit(relax.op.multiply(twice, x))]))

    mod = lower_to_vm(relax.transform.LegalizeOps()(graph(both, x=[4])))
    executable = relax.build(lower_memory(mod), target="llvm", relax_pipeline=None)
    ids = tvm.runtime.tensor(np.zeros((1, 4), np.int32))
    rows, x = tvm.runtime.tensor(np.zeros(1, np.int32)), np.arange(4, dtype=np.float32)
    found = relax.VirtualMachine(executable, tvm.cpu())["main"](
        ids, ids, rows, tvm.runtime.tensor(x)
    )
    np.testing.assert_array_equal(found[0].numpy(), 2 * x)
    np.testing.assert_array_equal(found[1].numpy(), 2 * x * x)


def test_a_second_round_changes_nothing():
    once = planned(4)
    tvm.ir.assert_structural_equal(share_tensors(once), once, map_free_vars=True)
