"""GLSL to SPIR-V by the Khronos tools: compiled, optimized and validated at build time."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from llmc.errors import CompileError

ENVIRONMENT = "vulkan1.2"
_TAIL = 600  # characters of a tool's complaint that are shown
TOOLS = {"glslangValidator": "glslang-tools", "spirv-val": "spirv-tools"}  # Debian's packages


def missing_tools() -> list[str]:
    """The packages, by Debian's names, of the tools that are not installed."""
    return [package for tool, package in TOOLS.items() if shutil.which(tool) is None]


def check_tools() -> None:
    """Raises CompileError where a tool is missing."""
    missing = missing_tools()
    if missing:
        raise CompileError(
            f"the Vulkan target needs {' and '.join(TOOLS)}",
            hint=f"apt-get install {' '.join(missing)}",
        )


@cache
def compile_glsl(name: str, source: str) -> bytes:
    """The SPIR-V of a compute shader; raises CompileError where a tool is missing or objects.

    Equal sources are compiled once.
    """
    check_tools()
    with tempfile.TemporaryDirectory(prefix="llmc-glsl-") as folder:
        text, binary = Path(folder) / "kernel.comp", Path(folder) / "kernel.spv"
        text.write_text(source, encoding="utf-8")
        compiler = ["glslangValidator", "-V", "-Os", "--target-env", ENVIRONMENT]
        _run(name, [*compiler, "-o", str(binary), str(text)])
        validator = ["spirv-val", "--target-env", ENVIRONMENT, "--scalar-block-layout"]
        _run(name, [*validator, str(binary)])
        return binary.read_bytes()


def _run(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-_TAIL:]
        raise CompileError(f"kernel {name}: {command[0]} failed: {said}")
