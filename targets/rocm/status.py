"""What this machine lacks to build and to run ROCm artifacts."""

from __future__ import annotations

import tvm_ffi

from llmc.device_plugin import load_plugin
from llmc.errors import CompileError
from llmc.targets.rocm.linker import LINKER_HINT, find_linker
from llmc.targets.status import Lack

_DRIVER_HINT = "install AMD's driver and ROCm 6.0 or newer: its HIP runtime, libamdhip64.so"


def lacks() -> list[Lack]:
    """Nothing where both work; builds the plug-in where it can."""
    import tvm  # noqa: F401 - loads the libraries that the plug-in needs

    found: list[Lack] = []
    if find_linker() is None:
        found.append(Lack(reason="linking kernels needs ld.lld", hint=LINKER_HINT, run=False))
    try:
        load_plugin("rocm")
    except CompileError as exc:
        return [*found, Lack(reason=exc.message, hint=exc.hint or "")]
    problem = str(tvm_ffi.get_global_func("llmc.rocm.problem")())
    if problem:
        found.append(Lack(reason=problem, hint=_DRIVER_HINT, build=False))
    return found
