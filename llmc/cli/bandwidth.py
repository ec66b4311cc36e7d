"""The memory's read bandwidth as NumPy threads reach it: what decoding is measured against."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_TOTAL_BYTES = 512 << 20  # well beyond the last-level cache of most machines
_PASSES = 5

METHOD = (
    f"best of {_PASSES} passes of np.max over {_TOTAL_BYTES >> 20} MiB of int32, "
    "one array a thread, a thread for each CPU this process may use"
)


def num_cpus() -> int:
    """CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_bandwidth() -> float:
    """Bytes per second read from memory by all CPUs together, measured as METHOD says.

    np.max on int32 costs the least arithmetic of NumPy's reductions, and it releases the GIL.
    """
    threads = num_cpus()
    # Written, not just allocated: untouched pages would all be one page of zeros.
    arrays = [np.ones(_TOTAL_BYTES // 4 // threads, np.int32) for _ in range(threads)]
    num_bytes = sum(array.nbytes for array in arrays)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = min(best, time.perf_counter() - start)
    return num_bytes / best
