"""Runs kernels that use matrix registers on any x86 processor: their instructions become calls of
amx_emulator.c.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx

from llmc.targets.cpu import link

EMULATOR = Path(__file__).with_name("amx_emulator.c")
INSTRUCTIONS = (
    *("ldtilecfg", "tilerelease", "tilezero", "tileloadd64", "tilestored64"),
    *("tdpbssd", "tdpbsud", "tdpbf16ps"),
)


ALIGNMENT = 64  # bytes: what kernels assume of every argument
GUARD = 4096  # bytes before and behind every argument that no tile may touch


class EmulatedLibrary:
    """Compiled kernels; running one fails on what the processor would have faulted on."""

    def __init__(self, functions: dict[str, tirx.PrimFunc], path: Path, target: dict[str, Any]):
        named = {n: _emulated(f).with_attr("global_symbol", n) for n, f in functions.items()}
        with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
            built = tvm.compile(tvm.IRModule(named), target=tvm.target.Target(target))
        host = link.Platform(machine=link.host_machine(), system="Linux")

        def create(output: str, objects: list[str]) -> None:
            flags = ["-shared", "-fPIC", "-O2", "-o", output, str(EMULATOR)]
            subprocess.run([*link._compiler(host), *flags, *objects, "-lm"], check=True)

        built.export_library(str(path), fcompile=create)
        self._module = tvm_ffi.load_module(str(path))
        self._emulator = ctypes.CDLL(str(path))
        self._emulator.amx_error.restype = ctypes.c_char_p

    def run(self, name: str, *arrays: np.ndarray) -> np.ndarray:
        """Calls a kernel on copies of the arrays, with guards about them; the last one comes back.

        No instruction was misused, and every configuration was released.
        """
        copies = [self._guarded(array) for array in arrays]
        self._module[name](*copies)
        self._emulator.amx_allow_all()
        error = self._emulator.amx_error().decode()
        assert not error, error
        assert self._emulator.amx_active() == 0, "a configuration was not released"
        return copies[-1].numpy()

    @property
    def products(self) -> int:
        """Products of tiles since the library was loaded."""
        return int(self._emulator.amx_products())

    def _guarded(self, array: np.ndarray) -> tvm.runtime.Tensor:
        if array.size == 0:
            return tvm.runtime.tensor(array)
        raw = np.zeros(array.nbytes + 2 * GUARD + ALIGNMENT, np.uint8)
        begin = GUARD + -(raw.ctypes.data + GUARD) % ALIGNMENT
        copy = raw[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        for at in (begin - GUARD, begin + array.nbytes):
            self._emulator.amx_forbid(ctypes.c_void_p(raw.ctypes.data + at), ctypes.c_int64(GUARD))
        return tvm.runtime.from_dlpack(copy)


def _emulated(func: tirx.PrimFunc) -> tirx.PrimFunc:
    numbers = {
        int(tvm.target.codegen.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")): f"amx_{name}"
        for name in INSTRUCTIONS
    }
    replaced = 0

    def replace(call: Any) -> Any:
        nonlocal replaced
        if call.op.name != "tirx.call_llvm_intrin" or int(call.args[0]) not in numbers:
            return call
        replaced += 1
        rest = [_plain(a) for a in call.args[1:]]
        return tirx.call_extern("void", numbers[int(call.args[0])], *rest)

    body = tvm_ffi.structural.structural_map(func.body, (tvm.ir.Call, replace))
    assert replaced, "no tile instructions in this kernel"
    return func.with_body(body)


def _plain(argument: Any) -> Any:
    """Tile numbers as C's int."""
    is_number = isinstance(argument, tirx.IntImm) and str(argument.ty.dtype) == "uint8"
    return tirx.IntImm("int32", int(argument)) if is_number else argument
