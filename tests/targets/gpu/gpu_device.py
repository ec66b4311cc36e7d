"""Builds GPU kernels for this machine's Vulkan device and runs them on NumPy arrays."""

import numpy as np
import tvm
from vulkan_build import target


def build(functions):
    """One library of many kernels."""
    from llmc.targets.vulkan.build import register

    register()
    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    return tvm.compile(tvm.IRModule(named), target=target())


def run(kernel, *arrays, outputs):
    """Calls the kernel with `arrays`, of which those at the indices `outputs` come back."""
    device = tvm.device("vulkan", 0)
    tensors = [tvm.runtime.tensor(array, device) for array in arrays]
    kernel(*tensors)
    return [tensors[i].numpy() for i in outputs]


def normal(*shape):
    """Reproducible numbers of size 1, float32."""
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def empty(*shape, dtype=np.float32):
    """An output: what a kernel does not write is seen."""
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 99, dtype)
