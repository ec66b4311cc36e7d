"""Kernels run on any Vulkan driver, with matrix instructions emulated in shared memory."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Matrices with their exact values are the CPU tests' own, the device is that of the GPU kernels'.
sys.path += [str(HERE.parent / name) for name in ("cpu", "gpu", "vulkan")]


def pytest_collection_modifyitems(items):
    """Skips what runs kernels where no Vulkan driver does, and what builds where nothing links."""
    mine = [i for i in items if HERE in i.path.parents]
    if not mine:
        return
    from llmc.targets.registry import list_targets

    status = {s.name: s for s in list_targets()}
    vulkan, rocm = status["vulkan"], status["rocm"]
    for item in mine:
        if "emulated" in item.fixturenames and not (vulkan.can_build and vulkan.can_run):
            reason = f"{'; '.join(vulkan.reasons)}: {vulkan.hint}"
            item.add_marker(pytest.mark.skip(reason=reason))
        if "target" in item.fixturenames and not rocm.can_build:
            item.add_marker(pytest.mark.skip(reason=f"{'; '.join(rocm.reasons)}: {rocm.hint}"))
