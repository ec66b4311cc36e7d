"""AMD's GPUs, by the plug-in for TVM's runtime."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

from llmc.device_plugin import load_plugin
from llmc.errors import ArtifactError, CapacityError, LlmcError, UsageError
from llmc.runtime import tvm_runtime

DRIVER_HINT = "install AMD's driver and ROCm 6.0 or newer: its HIP runtime, libamdhip64.so"
# An artifact has code for one or several of these, and runs on each of them.
_ARCHITECTURES = ("gfx90a", "gfx942", "gfx1100")


class Rocm:
    """Implements Device; HIP_VISIBLE_DEVICES decides which devices there are."""

    tvm_name = "rocm"
    is_host = False

    def default_index(self) -> int:
        """The first."""
        return 0

    def prepare(self, index: int) -> None:
        """Loads the plug-in, after it is built where it has not been yet (CompileError)."""
        tvm_runtime.tvm_ffi()
        load_plugin("rocm")
        count = _ask("num_devices")
        if count == 0:
            raise ArtifactError(f"no ROCm device: {_ask('problem')}", hint=DRIVER_HINT)
        if index >= count:
            names = ", ".join(
                f"{i}: {_ask('device_name', i)} ({_ask('architecture', i)})" for i in range(count)
            )
            raise UsageError(f"there is no device rocm:{index}", hint=f"there are {names}")

    def features(self, index: int) -> frozenset[str]:
        """Every choice of architectures that the device's is one of: "gfx90a or gfx942"."""
        present = str(_ask("architecture", index))
        chosen = [
            choice
            for count in range(1, len(_ARCHITECTURES) + 1)
            for choice in combinations(_ARCHITECTURES, count)
            if present in choice
        ]
        return frozenset(" or ".join(choice) for choice in chosen)

    def withheld(self, index: int) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def available_bytes(self, index: int) -> int:
        """What the driver can still give."""
        return tvm_runtime.available_bytes(tvm_runtime.tvm_ffi().device("rocm", index))

    def graphs(self, index: int) -> None:
        """There are none."""
        return None

    def explain(self, error: Exception) -> LlmcError | None:
        """Errors of the plug-in's begin with "HIP: "."""
        found = re.search(r"HIP: ([^\n]*)", str(error))
        if found is None:
            return None
        said = f"HIP: {found[1]}"
        if "hipErrorOutOfMemory" in said:
            return CapacityError(said, hint="lower --kv-cache-tokens, or quantize further")
        if "no code for" in said or "hipErrorNoBinaryForGpu" in said:
            return ArtifactError(
                said, hint="compile the model with --target rocm: and this device's architecture"
            )
        if "damaged" in said or "cut short" in said or "not a module" in said:
            return ArtifactError(said, hint="compile the model again with this version of llmc")
        return LlmcError(said)


def _ask(name: str, *arguments: int) -> Any:  # noqa: ANN401 - what a function of TVM's returns
    return tvm_runtime.tvm_ffi().get_global_func(f"llmc.rocm.{name}")(*arguments)
