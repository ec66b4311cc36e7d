"""The shim itself: what it would not notice, the kernels' tests could not either."""

import subprocess
import sys
from pathlib import Path

import metal_shim
import numpy as np
import pytest

from llmc.targets.building import argument, kernel, put
from llmc.targets.gpu.kernels.block import add, launch, reduce, rows_of
from llmc.targets.metal.target import PARAMETERS

pytestmark = pytest.mark.skipif(
    metal_shim.COMPILER is None, reason="needs g++: apt-get install g++"
)
THREADS = 128
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def total():
    """y[r] = the sum of 128 numbers, over simdgroups and then over threadgroup memory."""
    with kernel("total") as built:
        rows = rows_of(None)
        x = argument("x", (rows, THREADS))
        y = argument("y", (rows, THREADS))
        with launch((rows,), (THREADS,)) as (row, thread):
            sum_ = reduce(x[row, thread], add, thread, THREADS, PARAMETERS.features)
            put(y, sum_, row, thread)
    return built.func


def run(edit=str):
    x = np.arange(3 * THREADS, dtype=np.float32).reshape(3, THREADS)
    library = metal_shim.build({"total": total()}, edit)
    (y,) = metal_shim.run(library["total"], x, np.zeros_like(x), outputs=[1])
    return x, y


def test_sums_over_simdgroups_and_the_threadgroup() -> None:
    x, y = run()
    np.testing.assert_array_equal(y, np.broadcast_to(x.sum(1, keepdims=True), x.shape))


def test_a_missing_barrier_is_noticed() -> None:
    def edit(source):
        assert source.count(BARRIER) == 1
        return source.replace(BARRIER, "")

    with pytest.raises(AssertionError, match="depends on the order of the threads"):
        run(edit)


# Each ends the process, with these words.
FAULTS = {
    "divergent": (BARRIER, f"if (threadIdx < 7) {BARRIER}", "barrier: only some of the threads"),
    "simdgroup": (
        "v[0] = simd_sum(",
        "if (threadIdx != 5) v[0] = simd_sum(",
        "simd_sum: only some",
    ),
    "outside": (BARRIER, f"v_1[4] = 0.0f; {BARRIER}", "threadgroup memory: written behind"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_be_undefined_ends_the_process(fault) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), fault], capture_output=True, text=True, check=False
    )
    assert done.returncode < 0
    assert FAULTS[fault][2] in done.stderr


def _fail(fault):
    before, after, _ = FAULTS[fault]

    def edit(source):
        assert before in source, source
        return source.replace(before, after)

    run(edit)


if __name__ == "__main__":
    _fail(sys.argv[1])
