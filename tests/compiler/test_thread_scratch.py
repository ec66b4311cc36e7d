import random

import pytest
import tvm
from tvm import relax
from tvm.script import tirx as TIR

from llmc.compiler.pipeline import lower_memory, lower_to_vm
from llmc.compiler.thread_scratch import ScratchMeter
from llmc.errors import CompileError

PAGE = 4096


def kernel(*sizes):
    """Each of its tasks allocates blocks of so many pages, one while it holds those before."""
    elements = [pages * PAGE // 4 for pages in sizes]
    first, second, third = (*elements, 1, 1)[:3]

    @TIR.prim_func(s_tir=True)
    def one(x: TIR.Buffer((16,), "float32")):
        for i in TIR.parallel(16):
            a = TIR.alloc_buffer((first,), "float32")
            for j in range(first):
                a[j] = x[i]
            x[i] = a[first - 1]

    @TIR.prim_func(s_tir=True)
    def two(x: TIR.Buffer((16,), "float32")):
        for i in TIR.parallel(16):
            a = TIR.alloc_buffer((first,), "float32")
            for j in range(first):
                a[j] = x[i]
            b = TIR.alloc_buffer((second,), "float32")
            for j in range(second):
                b[j] = a[j % first]
            x[i] = b[second - 1]

    @TIR.prim_func(s_tir=True)
    def three(x: TIR.Buffer((16,), "float32")):
        for i in TIR.parallel(16):
            a = TIR.alloc_buffer((first,), "float32")
            for j in range(first):
                a[j] = x[i]
            for k in range(2):  # frees what it allocates each time
                b = TIR.alloc_buffer((second,), "float32")
                for j in range(second):
                    b[j] = a[j % first]
                c = TIR.alloc_buffer((third,), "float32")
                for j in range(third):
                    c[j] = b[j % second]
                x[i] = c[third - 1 - k]

    return {1: one, 2: two, 3: three}[len(sizes)]


def measured(*kernels):
    """Pages that the meter finds for a thread that runs them, and for the one that calls them."""
    meter = ScratchMeter()
    functions = {
        f"kernel_{i}": k.with_attr("global_symbol", f"kernel_{i}") for i, k in enumerate(kernels)
    }
    config = {"tirx.disable_storage_rewrite": True}
    with tvm.transform.PassContext(config=config, instruments=[meter]):
        tvm.tirx.build(tvm.IRModule(functions), target="llvm")
    found = meter.measured(tvm.IRModule(functions))
    return found.each_thread / PAGE, found.caller / PAGE


def pooled(calls):
    """Pages that TVM's pool of one thread holds after kernels with such sizes have run."""
    free = []
    for sizes in calls:
        held = []
        for size in sizes:
            fitting = [block for block in free if block >= size]
            block = min(fitting) if fitting else max(free, default=None)
            if block is not None:
                free.remove(block)
            held.append(max(block or 0, size))
        free += held
    return sum(free)


def test_a_kernel_needs_what_it_holds_at_once():
    assert measured(kernel(3)) == (3, 0)
    assert measured(kernel(5, 3, 1)) == (9, 0)


def test_kernels_use_each_others_blocks():
    assert measured(kernel(5), kernel(3), kernel(4)) == (5, 0)
    assert measured(kernel(5, 2), kernel(3, 1)) == (7, 0)


@pytest.mark.parametrize("seed", range(5))
def test_no_order_of_kernels_makes_the_pool_larger(seed):
    generator = random.Random(seed)
    all_sizes = [
        tuple(generator.randint(1, 9) for _ in range(generator.randint(1, 3))) for _ in range(4)
    ]
    bound, _ = measured(*(kernel(*sizes) for sizes in all_sizes))
    found = [pooled(generator.choices(all_sizes, k=30)) for _ in range(200)]
    assert max(found) <= bound <= 3 * 9


def test_what_the_caller_allocates_it_holds_while_its_tasks_run():
    @TIR.prim_func(s_tir=True)
    def outside(x: TIR.Buffer((1024,), "float32")):
        a = TIR.alloc_buffer((1024,), "float32")
        for j in range(1024):
            a[j] = x[1023 - j]
        for i in TIR.parallel(16):
            b = TIR.alloc_buffer((2048,), "float32")
            for j in range(2048):
                b[j] = a[j % 1024]
            x[i] = b[2047 - i]

    assert measured(outside) == (2, 2)  # blocks of 2 pages: either may be used for the other
    assert measured(outside, kernel(5)) == (5, 2)


@TIR.prim_func(s_tir=True)
def dynamic(x: TIR.handle, y: TIR.handle):
    rows = TIR.int64()
    a = TIR.match_buffer(x, (rows, TIR.int64(4)), "float32")
    b = TIR.match_buffer(y, (rows, TIR.int64(4)), "float32")
    with TIR.sblock("root"):
        for i in TIR.parallel(rows):
            own = TIR.alloc_buffer((rows * TIR.int64(64),), "float32")
            for j in TIR.serial(rows * TIR.int64(64)):
                own[j] = a[i, j % TIR.int64(4)]
            for j in TIR.serial(TIR.int64(4)):
                b[i, j] = own[rows + j]


def test_extents_count_at_the_bounds_of_whoever_calls():
    rows = tvm.tirx.Var("T", "int64")
    x = relax.Var("x", relax.TensorType([rows, 4], "float32"))
    builder = relax.BlockBuilder()
    name = builder.add_func(dynamic, "dynamic")
    with builder.function("main", [x]):
        with builder.dataflow():
            y = relax.call_tir(name, [x], relax.TensorType([rows, 4], "float32"))
            y = builder.emit_output(y)
        builder.emit_func_output(y)
    mod = builder.get()
    mod["main"] = mod["main"].with_attr("tir_var_upper_bound", {"T": 512})
    planned, meter = lower_to_vm(mod), ScratchMeter()
    with tvm.transform.PassContext(instruments=[meter]):
        relax.build(lower_memory(planned), target="llvm", relax_pipeline=None)
    assert meter.measured(planned).each_thread == 512 * 64 * 4


def test_what_nothing_bounds_is_an_error():
    @TIR.prim_func(s_tir=True)
    def endless(x: TIR.Buffer((16,), "int32")):
        for i in TIR.parallel(16):
            a = TIR.alloc_buffer((x[i],), "int32")
            for j in range(x[i]):
                a[j] = j
            x[i] = a[x[i] - 1]

    with pytest.raises(CompileError, match="nothing bounds the scratch of kernel kernel_0"):
        measured(endless)
