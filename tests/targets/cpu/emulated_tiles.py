"""Runs the object code of kernels that use matrix registers on processors that have none."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import tvm
from matrices import tensor

from llmc.cpu_features import host_features, withheld_features
from llmc.targets.cpu import link
from llmc.targets.cpu.target import ISA_LEVELS, CpuTarget

LEVEL = ISA_LEVELS["amx"]
BELOW = ISA_LEVELS["avx512bf16"]
needs_vectors = pytest.mark.skipif(
    not host_features().issuperset(BELOW.features), reason="this CPU has no AVX-512 BF16"
)
EMULATOR = Path(__file__).with_name("amx_emulator.c")
ALIGNMENT = 64  # bytes: what kernels assume of every argument
GUARD = 4096  # bytes before and behind every argument that no tile may touch


@cache
def _library() -> ctypes.CDLL:
    host = link.Platform(machine=link.host_machine(), system="Linux")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "amx_emulator.so"
        flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-std=gnu11"]
        subprocess.run([*link._compiler(host), *flags, "-o", str(path), str(EMULATOR)], check=True)
        library = ctypes.CDLL(str(path))
    library.amx_error.restype = ctypes.c_char_p
    return library


class Emulator:
    """Calls kernels; fails on what the processor would have faulted on."""

    def run(self, function: tvm.ffi.Function, *arrays: np.ndarray) -> list[np.ndarray]:
        """Calls a kernel on copies of the arrays, with guards about them; the copies come back.

        No instruction was misused, and every configuration was released.
        """
        library = _library()
        copies = [_guarded(library, array) for array in arrays]
        with _handler(library):
            function(*copies)
        library.amx_allow_all()
        error = library.amx_error().decode()
        library.amx_forget()
        assert not error, error
        assert library.amx_active() == 0, "a configuration was not released"
        return [copy.numpy() for copy in copies]

    @property
    def products(self) -> int:
        """Products of tiles so far."""
        return int(_library().amx_products())


@contextmanager
def _handler(library: ctypes.CDLL) -> Iterator[None]:
    library.amx_begin()
    try:
        yield
    finally:
        library.amx_end()


def _guarded(library: ctypes.CDLL, array: np.ndarray) -> tvm.runtime.Tensor:
    if array.size == 0:
        return tvm.runtime.tensor(array)
    raw = np.zeros(array.nbytes + 2 * GUARD + ALIGNMENT, np.uint8)
    begin = GUARD + -(raw.ctypes.data + GUARD) % ALIGNMENT
    copy = raw[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    for at in (begin - GUARD, begin + array.nbytes):
        library.amx_forbid(ctypes.c_void_p(raw.ctypes.data + at), ctypes.c_int64(GUARD))
    return tvm.runtime.from_dlpack(copy)


class Library:
    """Kernels as they are shipped; `emulator` where the processor has no matrix registers."""

    def __init__(self, functions: dict[str, tvm.tirx.PrimFunc]) -> None:
        # Neither the processor nor the emulator runs the code then: the instructions exist, so no
        # SIGILL reaches the emulator's handler.
        if withheld_features():
            pytest.skip("the system refuses the matrix registers, and nothing is left to emulate")
        named = {n: f.with_attr("global_symbol", n) for n, f in functions.items()}
        has_tiles = host_features().issuperset(LEVEL.features)
        self.emulator = None if has_tiles else Emulator()
        target = CpuTarget("amx")
        with tvm.transform.PassContext(**target.pass_options):
            self.module = tvm.compile(tvm.IRModule(named), target=target.tvm_target)

    def run(self, name: str, *arrays: np.ndarray) -> np.ndarray:
        """The last array, as the kernel leaves it."""
        return self.run_all(name, *arrays)[-1]

    def run_all(self, name: str, *arrays: np.ndarray) -> list[np.ndarray]:
        """All arrays likewise."""
        if self.emulator is not None:
            return self.emulator.run(self.module[name], *arrays)
        tensors = [tensor(a) for a in arrays]
        self.module[name](*tensors)
        return [t.numpy() for t in tensors]
