import numpy as np
import tvm
from graphs import T, assert_idempotent, assert_unchanged, graph
from tvm import relax

from llmc.compiler.passes.view_result import view_result
from llmc.compiler.pipeline import lower_memory, lower_to_vm

X = [1, T, 6]


def flat(emit, x):
    """Reshaped before and after it is doubled."""
    pairs = emit(relax.op.reshape(x, relax.ShapeExpr([1, T, 3, 2])))
    return relax.op.reshape(emit(relax.op.add(pairs, pairs)), relax.ShapeExpr([T, 6]))


def functions_of(mod):
    return sorted(name.name_hint for name in relax.transform.LegalizeOps()(mod).get_global_vars())


def test_no_kernel_copies_a_reshaped_result():
    mod = graph(flat, x=X)
    assert "reshape1" in functions_of(mod)
    assert functions_of(view_result(mod)) == ["add", "main", "reshape"]
    assert_idempotent(view_result, mod)


def test_the_result_is_the_reshaped_tensor():
    mod = view_result(graph(flat, x=X))
    mod["main"] = mod["main"].with_attr("tir_var_upper_bound", {"T": 8})
    lowered = lower_memory(lower_to_vm(relax.transform.LegalizeOps()(mod)))
    executable = relax.build(lowered, target="llvm", relax_pipeline=None)
    x = np.arange(12, dtype=np.float32).reshape(1, 2, 6)
    ids = np.zeros((1, 2), np.int32)
    given = [tvm.runtime.tensor(a) for a in (ids, ids, np.zeros(1, np.int32), x)]
    run = relax.VirtualMachine(executable, tvm.cpu())["main"]
    first = run(*given)
    run(*given[:-1], tvm.runtime.tensor(x + 1))  # the first result is no memory of the function's
    np.testing.assert_array_equal(first.numpy(), 2 * x[0])


def test_a_result_that_is_computed_is_left_alone():
    def doubled(emit, x):
        return relax.op.add(x, emit(relax.op.reshape(x, relax.ShapeExpr(X))))

    assert_unchanged(view_result, graph(doubled, x=X))
