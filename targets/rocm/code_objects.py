"""Builds device functions into a module of code objects: TVM's `target.build.rocm`.

TVM's code generator makes the machine code, once for each architecture and each size of blocks: the
size decides how many registers a thread may have. The module's bytes, little-endian, as
plugin/module.cc reads them (`str` is u32 length, bytes):

    "LLMCRO01"  u32 number of kernels, each
        str name  u32 number of arguments, each str  u32 number of launch tags, each str  u32 group
    u32 number of code objects, each
        str architecture  u32 group  u32 CRC-32 of the code  str code

A kernel's code is in the code object of its group and of the device's architecture.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from llmc.device_plugin import load_plugin
from llmc.errors import CompileError
from llmc.targets.gpu.module_bytes import string, strings, u32
from llmc.targets.rocm.linker import link_code_object
from llmc.targets.rocm.statements import block_threads, with_barriers

MAGIC = b"LLMCRO01"
_DEVICE_FUNCTIONS = Path(__file__).with_name("device_functions.ll")
_SCALARS = frozenset(
    ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What launching takes: each argument's type ("pointer" or a scalar's), the extents' tags."""

    name: str
    arguments: tuple[str, ...]
    launch: tuple[str, ...]
    threads: int  # of a block


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeObject:
    """The kernels of one size of blocks for one architecture, and their assembly for people."""

    architecture: str
    threads: int
    code: bytes
    assembly: str


def register(architectures: tuple[str, ...]) -> None:
    """Makes TVM build for ROCm with this module, for `architectures` of one family."""
    load_plugin("rocm")
    _code_generator()

    def build(mod: tvm.IRModule, target: tvm.target.Target) -> tvm_ffi.Module:
        load = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.llmc_rocm")
        return load(module_bytes(*compile_kernels(mod, target, architectures)))

    tvm_ffi.register_global_func("target.build.rocm", build, override=True)


def compile_kernels(
    mod: tvm.IRModule, target: tvm.target.Target, architectures: tuple[str, ...]
) -> tuple[list[Kernel], list[CodeObject]]:
    """The device functions `mod` as machine code; raises CompileError."""
    named = {str(f.attrs["global_symbol"]): f for f in mod.functions.values()}
    kernels = [_describe(name, func) for name, func in sorted(named.items())]
    objects = []
    for threads in sorted({kernel.threads for kernel in kernels}):
        names = [kernel.name for kernel in kernels if kernel.threads == threads]
        group = tvm.IRModule({name: with_barriers(named[name]) for name in names})
        objects += [_compile(group, target, arch, threads) for arch in architectures]
    return kernels, objects


def module_bytes(kernels: list[Kernel], objects: list[CodeObject]) -> bytes:
    """In the format that the module's docstring gives; a group's number is its blocks' threads."""
    out = [MAGIC, u32(len(kernels))]
    for kernel in kernels:
        out.append(string(kernel.name.encode()))
        out += [strings(kernel.arguments), strings(kernel.launch), u32(kernel.threads)]
    out.append(u32(len(objects)))
    for item in objects:
        out += [string(item.architecture.encode()), u32(item.threads, zlib.crc32(item.code))]
        out.append(string(item.code))
    return b"".join(out)


@contextmanager
def compiling_for(threads: int) -> Iterator[None]:
    """TVM finds a device, with or without one, whose blocks have up to `threads` threads."""
    pretend = tvm_ffi.get_global_func("llmc.rocm.compile_for")
    pretend(threads)
    try:
        yield
    finally:
        pretend(0)


@cache
def _code_generator() -> Callable[[tvm.IRModule, tvm.target.Target], Any]:
    """TVM's own, which `register` takes the place of."""
    found: Callable[[tvm.IRModule, tvm.target.Target], Any]
    found = tvm_ffi.get_global_func("target.build.rocm")
    return found


def _compile(
    group: tvm.IRModule, target: tvm.target.Target, architecture: str, threads: int
) -> CodeObject:
    linked: list[bytes] = []

    def link(code: bytes) -> bytes:
        linked.append(link_code_object(bytes(code)))
        return linked[-1]

    tvm_ffi.register_global_func("tvm_callback_rocm_link", link, override=True)
    tvm_ffi.register_global_func(
        "tvm_callback_rocm_bitcode_path", lambda *_: [str(_DEVICE_FUNCTIONS)], override=True
    )
    with compiling_for(threads):
        own = tvm.target.Target({**target.export(), "mcpu": architecture})
        module = _code_generator()(group, own)
    [code] = linked
    return CodeObject(
        architecture=architecture,
        threads=threads,
        code=code,
        assembly=str(module.inspect_source("asm")),
    )


def _describe(name: str, func: tvm.tirx.PrimFunc) -> Kernel:
    try:
        threads = block_threads(func)
    except CompileError as exc:
        raise CompileError(f"kernel {name}: {exc.message}") from exc
    return Kernel(
        name=name,
        arguments=tuple(_argument(name, param) for param in func.params),
        launch=tuple(str(t) for t in func.attrs.get("tirx.kernel_launch_params", ())),
        threads=threads,
    )


def _argument(kernel: str, param: tvm.tirx.Var) -> str:
    if type(param.ty).__name__ == "PointerType":
        return "pointer"
    dtype = str(param.ty.dtype)
    if dtype == "bool":
        return "uint8"
    if dtype not in _SCALARS:
        raise CompileError(f"kernel {kernel}: argument {param.name} of type {dtype}")
    return dtype
