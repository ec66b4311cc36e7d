"""Builds kernels for this machine's Vulkan device and runs them on NumPy arrays."""

import numpy as np
import tvm

TARGET = {
    "kind": "vulkan",
    "max_num_threads": 256,
    "max_threads_per_block": 256,
    "max_shared_memory_per_block": 32768,
    "thread_warp_size": 1,
    "supports_float16": True,
    "supports_16bit_buffer": True,
    "supports_int8": True,
    "supports_8bit_buffer": True,
    "supports_int64": True,
}


def target():
    return tvm.target.Target(TARGET, host="llvm")


def compiled(func):
    from llmc.targets.vulkan.build import register

    register()
    return tvm.compile(func, target=target())


def run(func, *arguments):
    """Calls `func` with arrays copied to the device and back; returns them after the call."""
    device = tvm.device("vulkan", 0)
    library = compiled(func)
    values = [tvm.runtime.tensor(a, device) if isinstance(a, np.ndarray) else a for a in arguments]
    library["main"](*values)
    return [v.numpy() if isinstance(v, tvm.runtime.Tensor) else v for v in values]
