"""The GPU kernels run on any Vulkan driver, on Mesa's lavapipe as well as on a GPU."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Matrices and ragged batches with their exact values are the CPU tests' own.
sys.path += [str(HERE.parent / "cpu"), str(HERE.parent / "vulkan")]


def pytest_collection_modifyitems(items):
    """Skips what runs kernels where no Vulkan driver does."""
    mine = [i for i in items if HERE in i.path.parents and "kernels" in i.fixturenames]
    if not mine:
        return
    from llmc.targets.registry import list_targets

    [status] = [s for s in list_targets() if s.name == "vulkan"]
    if not (status.can_build and status.can_run):
        reason = f"{'; '.join(status.reasons)}: {status.hint}"
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=reason))
