"""Makes code objects of object files: what HIP loads is a shared ELF library."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llmc.errors import CompileError

LINKER_HINT = 'pip install "llmc[compile]" brings ziglang, which has one; or apt-get install lld-19'
_LINKERS = ("ld.lld-22", "ld.lld-21", "ld.lld-20", "ld.lld-19", "/opt/rocm/llvm/bin/ld.lld")
_TAIL = 400  # characters of the linker's complaint that are shown


def find_linker() -> list[str] | None:
    """The command of an LLVM linker that knows these architectures: zig's or the system's."""
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "ld.lld"]
    return next(([name] for name in _LINKERS if shutil.which(name)), None)


def link_code_object(code: bytes) -> bytes:
    """The code object of an object file; raises CompileError.

    An undefined symbol is an error here, where it can be named: the driver would not name it.
    """
    linker = find_linker()
    if linker is None:
        raise CompileError("building for ROCm needs ld.lld, which was not found", hint=LINKER_HINT)
    with tempfile.TemporaryDirectory(prefix="llmc-rocm-") as name:
        source, output = Path(name) / "kernels.o", Path(name) / "kernels.co"
        source.write_bytes(code)
        command = [*linker, "--no-undefined", "-shared", str(source), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{linker[-1]} failed: {done.stderr.strip()[-_TAIL:]}")
        return output.read_bytes()
