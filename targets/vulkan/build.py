"""Builds device functions into a module of SPIR-V kernels: TVM's `target.build.vulkan`.

The module's bytes, little-endian, as plugin/module.cc reads them (`str` is u32 length, bytes):

    "LLMCVK02"  u32 threads of the subgroups that kernels presume (1: any)
    u32 number of kernels, each
        str name  u32 number of arguments, each str  u32 number of launch tags, each str
        u32 flags (1: folds x into z, 2: arguments in a buffer)  u32 workgroup x, y, z
        u32 CRC-32 of the code  str code
    u32 number of features, each str
"""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor

import tvm
import tvm_ffi

from llmc.device_plugin import load_plugin
from llmc.targets.gpu.module_bytes import string, strings, u32
from llmc.targets.vulkan.glsl_kernel import Kernel, print_kernel
from llmc.targets.vulkan.spirv import compile_glsl

MAGIC = b"LLMCVK02"
FEATURES = "llmc_features"  # the module's function that names them
FOLDS_X = 1
ARGUMENTS_IN_BUFFER = 2
_ALWAYS = {"bufferDeviceAddress", "scalarBlockLayout", "timelineSemaphore"}
_LIMITS = {  # names of limits that the runtime knows, smallest first
    "threads": (128, 256, 512, 1024),
    "shared": (16384, 32768, 49152, 65536, 98304),
}
_NUM_TOOLS = 2  # processes of glslang at a time


def register() -> None:
    """Makes TVM build for Vulkan with this module; loads the plug-in that runs the result."""
    load_plugin("vulkan")
    tvm_ffi.register_global_func("target.build.vulkan", build, override=True)


def build(mod: tvm.IRModule, target: tvm.target.Target) -> tvm_ffi.Module:
    """The module of the device functions `mod`; raises CompileError."""
    kernels = [print_kernel(func) for func in mod.functions.values()]
    load = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.vulkan")
    return load(module_bytes(kernels, int(target.attrs["thread_warp_size"])))


def module_bytes(kernels: list[Kernel], subgroup: int = 1) -> bytes:
    """The kernels compiled, in the format that the module's docstring gives."""
    with ThreadPoolExecutor(_NUM_TOOLS) as pool:
        codes = list(pool.map(lambda k: compile_glsl(k.name, k.source), kernels))
    out = [MAGIC, u32(subgroup, len(kernels))]
    for kernel, code in zip(kernels, codes, strict=True):
        flags = FOLDS_X * kernel.folds_x + ARGUMENTS_IN_BUFFER * kernel.in_buffer
        out += [
            string(kernel.name.encode()),
            strings(kernel.arguments),
            strings(kernel.launch),
            u32(flags, *kernel.workgroup, zlib.crc32(code)),
            string(code),
        ]
    out.append(strings(sorted(required_features(kernels))))
    return b"".join(out)


def required_features(kernels: list[Kernel]) -> set[str]:
    """What a device needs to run all of `kernels`, by the names that the runtime knows."""
    features = _ALWAYS | {feature for kernel in kernels for feature in kernel.features}
    for kernel in kernels:
        x, y, z = kernel.workgroup
        features.add(_limit("threads", x * y * z))
        features.add(_limit("shared", kernel.shared_bytes))
    return features


def _limit(kind: str, wanted: int) -> str:
    """The name of the smallest limit that allows `wanted`."""
    return f"{kind}{next((step for step in _LIMITS[kind] if wanted <= step), wanted)}"
