"""The Khronos validation layers, synchronization validation included, watch the other tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = Path(__file__).parents[1]
LAYER = "VK_LAYER_KHRONOS_validation"
# What a message of theirs has: the rule that is broken, or the kind of the hazard.
MESSAGES = ("Validation Error", "Validation Warning", "Validation Performance", "SYNC-HAZARD")


@pytest.mark.slow
@pytest.mark.parametrize("staging", ["0", "1"])
@pytest.mark.parametrize(
    "tests", ["vulkan/test_plugin.py", "vulkan/test_code_generator.py", "gpu"], ids=Path
)
def test_the_layers_have_nothing_to_say(tests, staging):
    if staging == "1" and tests == "gpu":
        pytest.skip("kernels are the same whichever way copies go")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", TARGETS / tests],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "VK_INSTANCE_LAYERS": LAYER,
            "VK_LAYER_ENABLES": "VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT",
            "VK_LOADER_DEBUG": "layer",
            "LLMC_VULKAN_STAGING": staging,
        },
    )
    said = done.stdout + done.stderr
    if f'Insert instance layer "{LAYER}"' not in said:
        pytest.skip("needs the validation layers; apt-get install vulkan-validationlayers")
    assert done.returncode == 0, said[-3000:]
    complaints = [line for line in said.splitlines() if any(m in line for m in MESSAGES)]
    assert complaints == []
