"""NVIDIA's GPUs, by TVM's CUDA runtime."""

from __future__ import annotations

import ctypes
import re

from llmc.cuda_toolkit import CUDART, find_cudart
from llmc.errors import ArtifactError, CapacityError, LlmcError, UsageError
from llmc.runtime import tvm_runtime
from llmc.runtime.devices.cuda_graph import CudaGraphs
from llmc.runtime.devices.device import Graphs

_DRIVER_HINT = "install NVIDIA's driver 580 or newer"
_CUDART_HINT = 'pip install "llmc[cuda]" brings libcudart'
# tvm::runtime::DeviceAttrKind
_EXISTS, _COMPUTE_VERSION = 0, 4
# Features of artifacts: the oldest architecture that they hold code for.
_ARCHITECTURES = (80, 86, 89, 90, 100, 120)


class Cuda:
    """Implements Device; CUDA_VISIBLE_DEVICES decides which devices there are."""

    tvm_name = "cuda"
    is_host = False

    def default_index(self) -> int:
        """The first."""
        return 0

    def prepare(self, index: int) -> None:
        """Loads the driver, the CUDA runtime and TVM's part that calls them."""
        tvm_runtime.tvm_ffi()
        try:
            ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
        except OSError as exc:
            raise ArtifactError(f"no CUDA driver: {exc}", hint=_DRIVER_HINT) from exc
        _load_cudart()
        tvm_runtime.load_library("tvm_runtime_cuda")
        if not _attribute(index, _EXISTS):
            raise UsageError(
                f"there is no device cuda:{index}",
                hint="nvidia-smi lists the devices; CUDA_VISIBLE_DEVICES may hide some",
            )

    def features(self, index: int) -> frozenset[str]:
        """The architectures whose code the device runs, or has translated: sm_80 and so on."""
        major, minor = str(_attribute(index, _COMPUTE_VERSION)).split(".")
        present = 10 * int(major) + int(minor)
        return frozenset(f"sm_{number}" for number in _ARCHITECTURES if number <= present)

    def withheld(self, index: int) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def available_bytes(self, index: int) -> int:
        """What the driver can still give."""
        return tvm_runtime.available_bytes(tvm_runtime.tvm_ffi().device("cuda", index))

    def graphs(self, index: int) -> Graphs:
        """Recordings of steps on the device."""
        ffi = tvm_runtime.tvm_ffi()
        device = ffi.device("cuda", index)
        set_stream = ffi.get_global_func("runtime.Device_SetStream")
        return CudaGraphs(_load_cudart(), lambda stream: set_stream(device, stream), device)

    def explain(self, error: Exception) -> LlmcError | None:
        """Errors of CUDA's runtime and driver say CUDA and the error's name."""
        found = re.search(r"CUDA[^\n]*", str(error))
        if found is None:
            return None
        said = found[0][:300]
        if "out of memory" in said.lower() or "OUT_OF_MEMORY" in said:
            return CapacityError(said, hint="lower --kv-cache-tokens, or quantize further")
        if "no kernel image" in said.lower() or "NO_BINARY_FOR_GPU" in said:
            return ArtifactError(
                said, hint="compile the model with --target cuda and this device's architecture"
            )
        return LlmcError(said)


def _attribute(index: int, kind: int) -> object:
    attribute: object = tvm_runtime.attribute(tvm_runtime.tvm_ffi().device("cuda", index), kind)
    return attribute


def _load_cudart() -> ctypes.CDLL:
    library = find_cudart()
    if library is None:
        raise ArtifactError(f"{CUDART} was not found", hint=_CUDART_HINT)
    try:
        return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as exc:
        raise ArtifactError(f"{library} does not load: {exc}", hint=_CUDART_HINT) from exc
