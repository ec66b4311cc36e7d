import numpy as np
import pytest
import tvm
from tvm import relax

from llmc.compiler.pipeline import lower_memory, lower_to_vm
from llmc.compiler.rewriter import bindings

S, P, Q = (tvm.tirx.Var(name, "int64") for name in "SPQ")


def step():
    """A step of S tokens with one cache of P pages, whose number nothing else says, and weights."""
    shapes = {"x": [S], "host": None, "pages": [P, 4], "more_pages": [P, 4], "w": [1]}
    params = {
        name: relax.Var(name, relax.ShapeType([Q]) if s is None else relax.TensorType(s, "float32"))
        for name, s in shapes.items()
    }
    builder = relax.BlockBuilder()
    with builder.function("step", list(params.values())):
        with builder.dataflow():
            scaled = builder.emit(relax.op.multiply(params["x"], params["w"]))
            total = builder.emit(relax.op.add(params["pages"], params["more_pages"]))
            pair = builder.emit_output(relax.Tuple([scaled, total]))
        builder.emit_func_output(pair)
    mod = relax.transform.LegalizeOps()(builder.get())
    bounds = {"S": 8, "P": 8, "Q": 8}
    mod["step"] = mod["step"].with_attr("tir_var_upper_bound", bounds)
    return lower_memory(lower_to_vm(mod))


def checked(mod):
    """The arguments that are compared with their annotations, and how often."""
    names = [p.name for p in mod["step"].params]
    calls = [b.value for b in bindings(mod["step"]) if isinstance(b.value, relax.Call)]
    externs = [c for c in calls if isinstance(c.op, relax.ExternFunc)]
    first = [getattr(c.args[0], "name", "") for c in externs if ".alloc" not in str(c.op)]
    return {name: first.count(name) for name in names if name in first}


def test_inputs_are_checked_and_of_the_rest_only_what_binds_an_extent():
    assert checked(step()) == {"x": 2, "host": 2, "pages": 1}


def run(x, pages, more, w):
    executable = relax.build(step(), target="llvm", relax_pipeline=None)
    tensors = [tvm.runtime.tensor(np.asarray(a, np.float32)) for a in (x, pages, more, w)]
    function = relax.VirtualMachine(executable, tvm.cpu())["step"]
    scaled, total = function(tensors[0], tvm.runtime.ShapeTuple([3]), *tensors[1:])
    return scaled.numpy(), total.numpy()


def test_the_function_computes_what_it_did():
    pages = np.arange(8).reshape(2, 4)
    scaled, total = run([1, 2, 3], pages, pages, [2])
    np.testing.assert_array_equal(scaled, [2, 4, 6])
    np.testing.assert_array_equal(total, 2 * pages)


@pytest.mark.parametrize(
    ("more", "w"), [(np.zeros((3, 4)), [2]), (np.zeros((2, 4)), [2, 2])], ids=["cache", "weight"]
)
def test_a_kernel_refuses_state_of_another_shape(more, w):
    with pytest.raises(Exception, match=r"[Ss]hape|Mismatched|expected"):
        run([1, 2, 3], np.zeros((2, 4)), more, w)
