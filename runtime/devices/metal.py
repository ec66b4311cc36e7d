"""Apple's GPUs, by TVM's Metal runtime, which is in its wheels for macOS on Apple's processors."""

from __future__ import annotations

import platform
import re

from llmc.errors import ArtifactError, CapacityError, LlmcError, UsageError
from llmc.runtime import tvm_runtime
from llmc.runtime.memory import available_host_bytes

_EXISTS, _TOTAL_GLOBAL_MEMORY = 0, 14  # tvm::runtime::DeviceAttrKind
_FIRST_MACOS = 13


class Metal:
    """Implements Device; a Mac has one such GPU."""

    tvm_name = "metal"
    is_host = False

    def default_index(self) -> int:
        """There is one."""
        return 0

    def prepare(self, index: int) -> None:
        """Loads TVM's part that calls Metal."""
        here = platform.system(), platform.machine()
        if here != ("Darwin", "arm64"):
            raise ArtifactError(
                f"Metal runs on macOS with Apple's processors (arm64); this is {' '.join(here)}",
                hint="copy the artifact to such a Mac, or compile with another --target",
            )
        tvm_runtime.tvm_ffi()
        try:
            tvm_runtime.load_library("tvm_runtime_metal")
        except OSError as exc:
            raise ArtifactError(
                f"TVM's Metal runtime does not load: {str(exc)[-200:]}",
                hint="pip install --force-reinstall apache-tvm==0.27.0.post1",
            ) from exc
        if not _attribute(index, _EXISTS):
            raise UsageError(f"there is no device metal:{index}", hint="a Mac's GPU is metal:0")

    def features(self, index: int) -> frozenset[str]:
        """The processor, the systems whose libraries load, and the family of the GPU.

        The first Macs with a processor of Apple's had a GPU of family 7, which newer ones include.
        """
        newest = int(platform.mac_ver()[0].partition(".")[0] or 0)
        systems = {f"macos{number}" for number in range(_FIRST_MACOS, newest + 1)}
        return frozenset({"apple7", "arm64", *systems})

    def withheld(self, index: int) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def available_bytes(self, index: int) -> int:
        """What Metal recommends to use at most, of what the system has free.

        The GPU has no memory of its own.
        """
        recommended = _attribute(index, _TOTAL_GLOBAL_MEMORY)
        free = available_host_bytes()
        return min(free, int(str(recommended))) if recommended else free

    def graphs(self, index: int) -> None:
        """There are none."""
        return None

    def explain(self, error: Exception) -> LlmcError | None:
        """What macOS says of kernels that it does not compile, and the GPU's own errors."""
        text = str(error)
        found = re.search(r"Fail to compile metal (?:source|lib):[^\n]*", text)
        if found:
            return ArtifactError(
                found[0][:300],
                hint="macOS 13 or newer compiles the kernels; or compile the model again with this "
                "version of llmc",
            )
        found = re.search(r"GPUError[^\n]*", text)
        if found:
            said = f"Metal: {found[0][:300]}"
            if re.search(r"(?i)insufficient memory|out ?of ?memory", said):
                return CapacityError(said, hint="lower --kv-cache-tokens, or quantize further")
            return LlmcError(said, hint="start again; the system's log may say why it failed")
        if "maxTotalThreadsPerThreadgroup" in text:
            return ArtifactError(
                "Metal: a kernel has more threads than this GPU runs of it at once",
                hint="compile the model again with this version of llmc",
            )
        return None


def _attribute(index: int, kind: int) -> object:
    ffi = tvm_runtime.tvm_ffi()
    device = ffi.device("metal", index)
    attribute = ffi.get_global_func("runtime.GetDeviceAttr")
    return attribute(device.dlpack_device_type(), index, kind)
