import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import tirx as TIR

from llmc.compiler.passes.lift_scratch import NUM_SCRATCH, lift_scratch
from llmc.compiler.pipeline import lower_memory, lower_to_vm
from llmc.compiler.rewriter import bindings, op_args

ROWS = 40


@TIR.prim_func(s_tir=True, check_well_formed=True)
def kernel(x: TIR.handle, y: TIR.handle):
    rows = TIR.int64()
    a = TIR.match_buffer(x, (rows, TIR.int64(512)), "float32")
    b = TIR.match_buffer(y, (rows, TIR.int64(512)), "float32")
    with TIR.sblock("root"):
        small = TIR.alloc_buffer((TIR.int64(8),), "float32")
        small[TIR.int64(0)] = TIR.float32(1)
        tiles: TIR.let[TIR.int64] = (rows + TIR.int64(15)) // TIR.int64(16)
        if rows > TIR.int64(24):
            many = TIR.alloc_buffer((tiles, TIR.int64(16), TIR.int64(512)), "float32")
            for i in TIR.serial(rows):
                for j in TIR.serial(TIR.int64(512)):
                    many[i // TIR.int64(16), i % TIR.int64(16), j] = a[i, j] + TIR.float32(1)
            for i in TIR.parallel(rows):
                own = TIR.alloc_buffer((TIR.int64(512),), "float32")
                for j in TIR.serial(TIR.int64(512)):
                    own[j] = many[i // TIR.int64(16), i % TIR.int64(16), j] * TIR.float32(2)
                for j in TIR.serial(TIR.int64(512)):
                    b[i, j] = own[j] + small[TIR.int64(0)]
        else:
            few = TIR.alloc_buffer((tiles, TIR.int64(16), TIR.int64(512)), "float32")
            for i in TIR.serial(rows):
                for j in TIR.serial(TIR.int64(512)):
                    few[i // TIR.int64(16), i % TIR.int64(16), j] = a[i, j] * TIR.float32(3)
            for i in TIR.serial(rows):
                for j in TIR.serial(TIR.int64(512)):
                    b[i, j] = few[i // TIR.int64(16), i % TIR.int64(16), j]


def program(rows=None):
    """The kernel, twice."""
    rows = tvm.tirx.Var("T", "int64") if rows is None else rows
    x = relax.Var("x", relax.TensorType([rows, 512], "float32"))
    builder = relax.BlockBuilder()
    name = builder.add_func(kernel, "kernel")
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.call_tir(name, [x], relax.TensorType([rows, 512], "float32")))
            z = relax.call_tir(name, [y], relax.TensorType([rows, 512], "float32"))
            z = builder.emit_output(z)
        builder.emit_func_output(z)
    mod = builder.get()
    mod["main"] = mod["main"].with_attr("tir_var_upper_bound", {"T": ROWS})
    return mod


def called():
    passes = [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
    ]
    return tvm.transform.Sequential(passes)(program())


def kernel_of(mod):
    [found] = [f for _, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    return found


def test_scratch_that_the_arguments_bound_becomes_one_argument_for_all_branches():
    lifted = kernel_of(lift_scratch(called()))
    assert lifted.attrs[NUM_SCRATCH] == 1
    *_, scratch = lifted.params
    tiles, *rest = scratch.ty.shape
    assert [int(extent) for extent in rest] == [16, 512]
    assert tvm.sym.Analyzer().can_prove_equal(tiles, (lifted.params[0].ty.shape[0] + 15) // 16)


def test_what_tasks_have_to_themselves_and_what_lies_on_the_stack_is_left():
    text = kernel_of(lift_scratch(called())).script()
    assert text.count("alloc_buffer") + text.count("alloc_local") == 2
    assert "small" in text
    assert "own" in text


def test_callers_allocate_it_by_their_own_extents():
    mod = lift_scratch(called())
    rows = mod["main"].params[0].ty.shape[0]
    found = [op_args(b.value, "relax.builtin.alloc_tensor") for b in bindings(mod["main"])]
    scratch = [args[0].values for args in found if args and len(args[0].values) == 3]
    assert len(scratch) == 2
    for tiles, *rest in scratch:
        assert [int(extent) for extent in rest] == [16, 512]
        assert tvm.sym.Analyzer().can_prove_equal(tiles, (rows + 15) // 16)


@pytest.mark.parametrize("rows", [ROWS, 24, 1])
def test_numbers_are_those_of_the_kernel(rows):
    executable = relax.build(
        lower_memory(lower_to_vm(program())), target="llvm", relax_pipeline=None
    )
    x = np.random.default_rng(0).standard_normal((rows, 512)).astype(np.float32)
    run = relax.VirtualMachine(executable, tvm.cpu())["main"]
    found = run(tvm.runtime.tensor(x)).numpy()
    for _ in range(2):
        x = (x + 1) * 2 + 1 if rows > 24 else x * 3
    np.testing.assert_allclose(found, x, rtol=1e-6)


def test_a_second_round_changes_nothing():
    once = lift_scratch(called())
    tvm.ir.assert_structural_equal(lift_scratch(once), once, map_free_vars=True)
