"""Runs kernels for arm64 in QEMU's user mode: a program is linked about their object code."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import tvm
import tvm_ffi

from llmc.targets.cpu.target import CpuTarget

DRIVER = Path(__file__).with_name("arm_driver.c")
QEMU = next(filter(shutil.which, ("qemu-aarch64", "qemu-aarch64-static")), None)
"""The emulator's command, or None where it is not installed."""
_CODES = {"i": 0, "u": 1, "f": 2}  # of DLPack, by NumPy's kinds


class ArmLibrary:
    """Kernels compiled for a level, each call of which is a process."""

    def __init__(self, functions: dict[str, tvm.tirx.PrimFunc], folder: Path, level: str) -> None:
        named = {n: f.with_attr("global_symbol", n) for n, f in functions.items()}
        target = CpuTarget(level)
        with tvm.transform.PassContext(**target.pass_options):
            built = tvm.compile(tvm.IRModule(named), target=target.tvm_target)
        self.assembly = built.mod.inspect_source("asm")
        self._folder, self._program = folder, folder / "kernels"

        def create(output: str, objects: list[str]) -> None:
            zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl"]
            includes = {
                tvm_ffi.libinfo.find_include_path(),
                tvm_ffi.libinfo.find_dlpack_include_path(),
            }
            flags = ["-O2", "-static", f"-DFUNCTIONS={' '.join(f'F({n})' for n in functions)}"]
            command = [*zig, *flags, *(f"-I{i}" for i in sorted(includes)), str(DRIVER), *objects]
            subprocess.run([*command, "-o", str(self._program)], check=True)
            Path(output).touch()

        built.export_library(str(folder / "unused.so"), fcompile=create)

    def run(self, name: str, *arrays: np.ndarray) -> np.ndarray:
        """The last array, as the kernel leaves it."""
        given, left = self._folder / "in", self._folder / "out"
        with given.open("wb") as file:
            file.write(struct.pack("<q", len(arrays)))
            for array in arrays:
                type_ = _CODES[array.dtype.kind], 8 * array.dtype.itemsize
                file.write(np.array([*type_, array.ndim, *array.shape], np.int64).tobytes())
                file.write(np.ascontiguousarray(array).tobytes())
        command = [str(QEMU), "-cpu", "max", str(self._program), name, str(given), str(left)]
        subprocess.run(command, check=True)
        return np.frombuffer(left.read_bytes(), arrays[-1].dtype).reshape(arrays[-1].shape)
