"""Read bandwidth as NumPy threads reach it: what decoding is measured against."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.cpu_features import num_cores

_TOTAL_BYTES = 512 << 20  # well beyond the last-level cache of most machines
_PASSES = 5
_CACHED_BYTES = 2 << 20  # a thread's: beyond most cores' own caches, within those they share
_CACHED_SWEEPS = 32  # reads of the array in one pass: a pass has to outlast its own start

_COPIED_BYTES = 256 << 20  # beyond the caches of GPUs
_COPIES = 8  # in one pass

COPY_METHOD = (
    f"best of {_PASSES} passes of {_COPIES} copies of {_COPIED_BYTES >> 20} MiB within the "
    "device, bytes read and written"
)
METHOD = (
    f"best of {_PASSES} passes of np.max over {_TOTAL_BYTES >> 20} MiB of int32, "
    "one array a thread, a thread for each CPU this process may use"
)


def read_bandwidth() -> float:
    """Bytes per second read from memory by all CPUs together, measured as METHOD says.

    np.max on int32 costs the least arithmetic of NumPy's reductions, and it releases the GIL.
    """
    return _measure(_TOTAL_BYTES // num_cores(), sweeps=1)


def copy_bandwidth(device: Any) -> float:  # noqa: ANN401 - a device of tvm_ffi's
    """Bytes per second read and written by copies within a device's memory, as COPY_METHOD says."""
    from llmc.runtime import tvm_runtime

    source, target = (tvm_runtime.empty((_COPIED_BYTES // 4,), "float32", device) for _ in range(2))
    copy = tvm_runtime.tvm_ffi().get_global_func("runtime.TVMTensorCopyFromTo")
    best = float("inf")
    for _ in range(_PASSES):
        start = time.perf_counter()
        for _ in range(_COPIES):
            copy(source, target)
        tvm_runtime.wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _COPIES * _COPIED_BYTES / best


def cache_bandwidth() -> float:
    """Bytes per second read from the shared caches by all CPUs together, 2 MiB a CPU."""
    return _measure(_CACHED_BYTES, sweeps=_CACHED_SWEEPS)


def _measure(bytes_per_thread: int, *, sweeps: int) -> float:
    threads = num_cores()
    # Written, not just allocated: untouched pages would all be one page of zeros.
    arrays = [np.ones(bytes_per_thread // 4, np.int32) for _ in range(threads)]
    num_bytes = sweeps * sum(array.nbytes for array in arrays)

    def sweep(array: npt.NDArray[np.int32]) -> None:
        for _ in range(sweeps):
            np.max(array)

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            start = time.perf_counter()
            list(pool.map(sweep, arrays))
            best = min(best, time.perf_counter() - start)
    return num_bytes / best
