"""The GPU kernels run on any Vulkan driver, on Mesa's lavapipe as well as on a GPU."""

import functools
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES = "mesa-vulkan-drivers glslang-tools spirv-tools libvulkan-dev g++"
# Matrices and ragged batches with their exact values are the CPU tests' own.
sys.path += [str(HERE.parent / "cpu"), str(HERE.parent / "vulkan")]


@functools.cache
def why_not():
    """What this machine lacks, or an empty string."""
    import tvm_ffi

    from llmc.device_plugin import load_plugin, missing_packages
    from llmc.targets.vulkan.spirv import missing_tools

    missing = [*missing_packages("vulkan"), *missing_tools()]
    if missing:
        return f"needs {' '.join(missing)}"
    load_plugin("vulkan")
    return tvm_ffi.get_global_func("llmc.vulkan.problem")()


def pytest_collection_modifyitems(items):
    mine = [i for i in items if HERE in i.path.parents and "kernels" in i.fixturenames]
    if mine and why_not():
        reason = f"{why_not()}; apt-get install {PACKAGES}"
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=reason))
