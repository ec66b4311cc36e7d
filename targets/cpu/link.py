"""Links object code and the thread pool into the library that an artifact ships.

The compilers, in the order they are tried: the one that $CC names; zig, from the package `ziglang`;
the system's. Zig comes before the system's compiler on Linux because it links against the symbol
versions of an old C library: an artifact then loads on distributions older than the build machine.
It is also the only one of the three that links for another architecture.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tvm
import tvm_ffi

from llmc.errors import CompileError

THREADS = Path(__file__).with_name("threads.c")
_SYSTEM_COMPILERS = ("cc", "gcc", "clang")
_TAIL = 400  # characters of a compiler's complaint that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What a library is linked for; names are those of `platform.machine()` and `.system()`."""

    machine: str
    system: str

    @property
    def is_host(self) -> bool:
        """Whether this machine is of the kind."""
        return (self.machine, self.system) == (host_machine(), platform.system())


# glibc 2.28 is what the TVM runtime's own wheels ask for.
_ZIG_TARGETS = {
    ("x86_64", "Linux"): "x86_64-linux-gnu.2.28",
    ("aarch64", "Linux"): "aarch64-linux-gnu.2.28",
    ("x86_64", "Darwin"): "x86_64-macos.13.0-none",
    ("aarch64", "Darwin"): "aarch64-macos.13.0-none",
}


def host_machine() -> str:
    """The architecture of this machine, by the name that Linux uses."""
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())


def link(
    executable: tvm.runtime.Executable,
    path: Path,
    target: Platform,
    sources: Sequence[Path] = (THREADS,),
) -> None:
    """Writes the shared library `path` for `target`, with C `sources` of ours compiled into it.

    Raises CompileError where no compiler is found or the compiler fails.
    """

    def run(output: str, objects: list[str]) -> None:
        build_library([*map(str, sources), *objects], Path(output), target)

    executable.export_library(str(path), fcompile=run)


def check_compiler(target: Platform) -> None:
    """Raises CompileError where no compiler that links for `target` is found."""
    _compiler(target)


def build_library(inputs: list[str], path: Path, target: Platform) -> None:
    """Compiles and links `inputs`, files or options, into the shared library `path`.

    Raises CompileError as `link` does.
    """
    compiler = _compiler(target)
    _run([*compiler, *_arguments(str(path), inputs, target)], path.name)


def _compiler(target: Platform) -> list[str]:
    """The command of a C compiler that links for `target`."""
    named = shlex.split(os.environ.get("CC", ""))
    if named and target.is_host:
        if shutil.which(named[0]) is None:
            raise CompileError(
                f"the C compiler that CC names, {named[0]!r}, was not found",
                hint="unset CC to let llmc choose one",
            )
        return named
    found: list[list[str]] = []
    if importlib.util.find_spec("ziglang") is not None:
        zig_target = _ZIG_TARGETS[target.machine, target.system]
        found.append([sys.executable, "-m", "ziglang", "cc", "-target", zig_target])
    if target.is_host:
        system = [[tool] for tool in _SYSTEM_COMPILERS if shutil.which(tool)]
        found = system + found if target.system == "Darwin" else found + system
    if not found:
        kind = "this machine" if target.is_host else f"{target.machine} {target.system}"
        raise CompileError(f"no C compiler that links for {kind}", hint="pip install ziglang")
    return found[0]


def _arguments(output: str, inputs: list[str], target: Platform) -> list[str]:
    """Options of any compiler that understands GCC's; warnings are for our own tests."""
    undefined = []
    if target.system == "Darwin":
        # A Mach-O library has a name of its own, which would be the build machine's path.
        name = f"@rpath/{Path(output).name}"
        undefined = ["-undefined", "dynamic_lookup", f"-Wl,-install_name,{name}"]
    includes = {tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()}
    return [
        *("-shared", "-fPIC", "-O2", "-std=gnu11", "-fvisibility=hidden", "-pthread"),
        *undefined,
        *(f"-I{folder}" for folder in sorted(includes)),
        *("-o", output, *inputs, "-lm"),
    ]


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as exc:
        raise CompileError(f"linking {what} failed: {command[0]} does not start: {exc}") from exc
    if done.returncode:
        raise CompileError(
            f"linking {what} with {command[0]} failed: {done.stderr.strip()[-_TAIL:]}",
            hint="CC names another compiler to link with",
        )
