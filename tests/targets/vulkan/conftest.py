"""These tests run on any Vulkan driver, on Mesa's lavapipe as well as on a GPU."""

import functools
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@functools.cache
def why_not():
    """What this machine lacks, or an empty string."""
    from llmc.targets.vulkan.status import lacks

    return "; ".join(f"{lack.reason}: {lack.hint}" for lack in lacks())


def pytest_collection_modifyitems(items):
    mine = [item for item in items if HERE in item.path.parents]
    if mine and why_not():
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=why_not()))
