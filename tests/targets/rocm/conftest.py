"""Building needs a linker and a compiler for the plug-in; running kernels a Vulkan driver."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Matrices with their exact values are the CPU tests' own, the device is that of the GPU kernels'.
sys.path += [str(HERE.parent / name) for name in ("cpu", "gpu", "vulkan")]


@pytest.fixture(scope="session")
def rocm():
    """Skips where this machine cannot build for ROCm."""
    _skip_without("rocm", run=False)


@pytest.fixture(scope="session")
def vulkan():
    """Skips where this machine cannot run kernels, as shaders."""
    _skip_without("vulkan", run=True)


def _skip_without(name, *, run):
    from llmc.targets.registry import list_targets

    [status] = [s for s in list_targets() if s.name == name]
    if not status.can_build or (run and not status.can_run):
        pytest.skip(f"{'; '.join(status.reasons)}: {status.hint}")
