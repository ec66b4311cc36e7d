import random

import pytest
import tvm
from tvm.script import tirx as TIR

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
    """Pages that the meter finds for a thread that runs them."""
    meter = ScratchMeter()
    functions = {
        f"kernel_{i}": k.with_attr("global_symbol", f"kernel_{i}") for i, k in enumerate(kernels)
    }
    config = {"tirx.disable_storage_rewrite": True}
    with tvm.transform.PassContext(config=config, instruments=[meter]):
        tvm.tirx.build(tvm.IRModule(functions), target="llvm")
    return meter.bytes_per_thread() / PAGE


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
    assert measured(kernel(3)) == 3
    assert measured(kernel(5, 3, 1)) == 9


def test_kernels_use_each_others_blocks():
    assert measured(kernel(5), kernel(3), kernel(4)) == 5
    assert measured(kernel(5, 2), kernel(3, 1)) == 7


@pytest.mark.parametrize("seed", range(5))
def test_no_order_of_kernels_makes_the_pool_larger(seed):
    generator = random.Random(seed)
    all_sizes = [
        tuple(generator.randint(1, 9) for _ in range(generator.randint(1, 3))) for _ in range(4)
    ]
    bound = measured(*(kernel(*sizes) for sizes in all_sizes))
    found = [pooled(generator.choices(all_sizes, k=30)) for _ in range(200)]
    assert max(found) <= bound <= 3 * 9


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
