"""Vulkan devices, by the plug-in for TVM's runtime."""

from __future__ import annotations

import os
import re
from typing import Any

from llmc.device_plugin import load_plugin
from llmc.errors import ArtifactError, CapacityError, LlmcError, UsageError
from llmc.runtime import tvm_runtime

_DEVICE = "LLMC_VULKAN_DEVICE"


class Vulkan:
    """Implements Device; the fastest kind of device has index 0."""

    tvm_name = "vulkan"
    is_host = False

    def default_index(self) -> int:
        """$LLMC_VULKAN_DEVICE, or 0."""
        text = os.environ.get(_DEVICE, "").strip() or "0"
        if not re.fullmatch("[0-9]{1,3}", text):
            raise UsageError(f"{_DEVICE} is {text[:40]!r}, not the number of a device")
        return int(text)

    def prepare(self, index: int) -> None:
        """Loads the plug-in, after it is built where it has not been yet (CompileError)."""
        tvm_runtime.tvm_ffi()
        load_plugin("vulkan")
        count = _ask("llmc.vulkan.num_devices")
        if count == 0:
            raise ArtifactError(
                f"no Vulkan device: {_ask('llmc.vulkan.problem')}",
                hint="install the driver of your GPU; apt-get install mesa-vulkan-drivers brings "
                "those for AMD, Intel and, slowly, any CPU",
            )
        if index >= count:
            names = ", ".join(f"{i}: {_ask('llmc.vulkan.device_name', i)}" for i in range(count))
            raise UsageError(f"there is no device vulkan:{index}", hint=f"there are {names}")

    def features(self, index: int) -> frozenset[str]:
        """Vulkan's names of features, and limits such as threads256."""
        return frozenset(str(name) for name in _ask("llmc.vulkan.features", index))

    def withheld(self, index: int) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def available_bytes(self, index: int) -> int:
        """What the driver would give, or the size of the heap where it does not say."""
        return tvm_runtime.available_bytes(tvm_runtime.tvm_ffi().device("vulkan", index))

    def graphs(self, index: int) -> None:
        """There are none."""
        return None

    def explain(self, error: Exception) -> LlmcError | None:
        """Errors of the plug-in's begin with "Vulkan: "."""
        found = re.search(r"Vulkan: (.*)", str(error))
        if found is None:
            return None
        said = f"Vulkan: {found[1]}"
        if "VK_ERROR_OUT_OF_" in said:
            return CapacityError(said, hint="lower --kv-cache-tokens, or quantize further")
        if "VK_ERROR_DEVICE_LOST" in said:
            return LlmcError(said, hint="start again; the system's log may say why it failed")
        if "damaged" in said or "cut short" in said or "not a module" in said:
            return ArtifactError(said, hint="compile the model again with this version of llmc")
        return LlmcError(said)


def _ask(name: str, *arguments: int) -> Any:  # noqa: ANN401 - what a function of TVM's returns
    return tvm_runtime.tvm_ffi().get_global_func(name)(*arguments)
