"""The CUDA tools that building takes: nvcc, the runtime library, and a driver or what stands in."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import tvm_ffi

from llmc.cuda_toolkit import CUDART, find_cudart, toolkit_folders
from llmc.device_plugin import cache_folder
from llmc.errors import CompileError
from llmc.targets.cpu.link import Platform, build_library, host_machine

_DRIVER = "libcuda.so.1"
NVCC_HINT = 'pip install "llmc[cuda]", or install the CUDA toolkit 13.0 and put nvcc on the PATH'
_TAIL = 800  # characters of a compiler's complaint that are shown

# All that TVM's CUDA runtime takes from the driver. 100 is CUDA_ERROR_NO_DEVICE.
_DRIVER_FUNCTIONS = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)


def find_tool(name: str) -> str | None:
    """The path of nvcc, cuobjdump and so on: on the PATH, of PyPI's packages, or the toolkit's."""
    found = shutil.which(name)
    if found is not None:
        return found
    places = [folder / "bin" / name for folder in toolkit_folders()]
    return next((str(place) for place in places if place.exists()), None)


def compile_cuda(code: str, architectures: tuple[str, ...]) -> bytes:
    """A fat binary of machine code for each of `architectures` (sm_80 …) and PTX of the last.

    Raises CompileError where nvcc is missing or refuses the code.
    """
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise CompileError("building for CUDA needs nvcc, which was not found", hint=NVCC_HINT)
    with tempfile.TemporaryDirectory(prefix="llmc-cuda-") as name:
        source, output = Path(name) / "kernels.cu", Path(name) / "kernels.fatbin"
        source.write_text(code, encoding="utf-8")
        command = [nvcc, "-fatbin", "-O3", "--threads", "2", *_generate(architectures)]
        done = subprocess.run(
            [*command, "-o", str(output), str(source)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise CompileError(f"nvcc failed: {said[-_TAIL:]}")
        return output.read_bytes()


def _generate(architectures: tuple[str, ...]) -> list[str]:
    numbers = [architecture.removeprefix("sm_") for architecture in architectures]
    # Hopper's own instructions are there under the name 90a only.
    exact = [n + "a" if n == "90" else n for n in numbers]
    options = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in exact]
    newest = numbers[-1]
    return [*options, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


@cache
def load_cuda_runtime() -> None:
    """Loads TVM's CUDA runtime, without which it would embed sources in place of machine code.

    A machine without a driver gets one that knows no device. Raises CompileError where libcudart
    is missing.
    """
    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    if not has_driver():
        _load(_stub_driver())
    runtime = find_cudart()
    if runtime is None:
        raise CompileError(f"building for CUDA needs {CUDART}, which was not found", hint=NVCC_HINT)
    _load(runtime)
    spec = importlib.util.find_spec("tvm")
    assert spec is not None, "tvm is a dependency of this package"
    assert spec.submodule_search_locations, spec
    _load(Path(spec.submodule_search_locations[0]) / "lib" / "libtvm_runtime_cuda.so")


def has_driver() -> bool:
    """Whether the driver's library is installed."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


def _load(library: str | Path) -> None:
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as exc:
        raise CompileError(f"{library} does not load: {exc}", hint=NVCC_HINT) from exc


def _stub_driver() -> Path:
    """A libcuda.so.1 whose functions say that there is no device; built once."""
    library = cache_folder() / "plugins" / "cuda-stub" / _DRIVER
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        source, fresh = Path(folder) / "driver.c", Path(folder) / _DRIVER
        functions = (
            f'__attribute__((visibility("default"))) int {name}(void) {{ return 100; }}\n'
            for name in _DRIVER_FUNCTIONS
        )
        source.write_text("".join(functions), encoding="utf-8")
        host = Platform(machine=host_machine(), system="Linux")
        build_library([str(source), f"-Wl,-soname,{_DRIVER}"], fresh, host)
        fresh.replace(library)  # at once: another process may be building it too
    return library
