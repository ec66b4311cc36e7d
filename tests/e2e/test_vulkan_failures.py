"""Devices that lack something, fail, or get a damaged artifact: one clear error each, no crash.

A layer between llmc and the driver pretends what this machine's device does not have or do.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import llmc
from llmc.artifact import MANIFEST_FILE, Manifest
from llmc.errors import ArtifactError, CapacityError, LlmcError

sys.path.insert(0, str(Path(__file__).parents[1] / "targets" / "vulkan"))

from pretended_device import PretendedDevice

pytestmark = pytest.mark.usefixtures("vulkan")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> PretendedDevice:
    try:
        return PretendedDevice(tmp_path_factory.mktemp("layer"))
    except FileNotFoundError as exc:
        pytest.skip(str(exc))


def run_llmc_with(variables: dict[str, str], *arguments: object) -> tuple[int, str]:
    """A command in a process of its own: its exit code and what it said on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "llmc.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "400", "NO_COLOR": "1", **variables},
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_the_layer_alone_changes_nothing(on_vulkan: Path, device: PretendedDevice) -> None:
    code, said = run_llmc_with(device.environment(), "verify", on_vulkan)
    assert code == 0, said


@pytest.mark.parametrize("feature", ["shaderFloat16", "bufferDeviceAddress"])
def test_a_device_that_lacks_a_feature_is_refused_by_its_name(
    tiny_model: Path, tmp_path: Path, device: PretendedDevice, feature: str
) -> None:
    artifact = tmp_path / "a"
    llmc.compile(
        tiny_model, target="vulkan", quant="w8a16", kv="f16", out=artifact, max_batch_tokens=16
    )
    assert feature in Manifest.load(artifact).variants[0].features
    code, said = run_llmc_with(device.environment(without=feature), "verify", artifact)
    assert code == ArtifactError.exit_code
    assert f"needs {feature}" in said
    assert "hint: compile the model again on (or for) a machine like this one" in said


def test_a_device_with_too_little_memory_is_refused_with_the_plans_sum(
    on_vulkan: Path, device: PretendedDevice
) -> None:
    code, said = run_llmc_with(device.environment(heap_bytes=300_000), "verify", on_vulkan)
    assert code == CapacityError.exit_code
    assert "= weights 0.00 GiB + workspace" in said
    assert "hint: " in said


@pytest.mark.parametrize("submission", [1, 2, 5, 20])
def test_a_device_that_is_lost_ends_the_command_with_vulkans_name_for_it(
    on_vulkan: Path, device: PretendedDevice, submission: int
) -> None:
    code, said = run_llmc_with(device.environment(lost_at=submission), "verify", on_vulkan)
    assert code == LlmcError.exit_code
    assert "VK_ERROR_DEVICE_LOST" in said
    assert "hint: start again; the system's log may say why it failed" in said


def test_cooperative_matrices_are_found_where_a_driver_lists_the_shape(
    on_vulkan: Path, device: PretendedDevice
) -> None:
    code = """
from llmc.runtime.devices import DEVICES
DEVICES["vulkan"].prepare(0)
print(*sorted(DEVICES["vulkan"].features(0)))
"""
    features = []
    for variables in (device.environment(), device.environment(matrices=1)):
        environment = {**os.environ, **variables}
        text = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
        features.append(set(text.split()))
    found = {"cooperativeMatrix16x16x16", "subgroupSize32"} & (features[1] - features[0])
    assert "cooperativeMatrix16x16x16" in found or "cooperativeMatrix16x16x16" in features[0]
    assert "subgroupSize32" in features[1]


def damaged(artifact: Path, out: Path, *, hashes: bool) -> Path:
    """A copy with one bit of a kernel's SPIR-V changed; `hashes`: in the manifest as well."""
    shutil.copytree(artifact, out)
    library = out / Manifest.load(artifact).variants[0].library
    code = bytearray(library.read_bytes())
    code[code.index(b"\x03\x02\x23\x07", code.index(b"LLMCVK02")) + 400] ^= 1
    library.write_bytes(code)
    if hashes:
        manifest = Manifest.load(artifact)
        files = {**manifest.files, library.name: hashlib.sha256(code).hexdigest()}
        (out / MANIFEST_FILE).write_text(replace(manifest, files=files).to_json())
    return out


def test_damaged_code_is_refused_by_its_hash_and_by_its_own_sum(
    on_vulkan: Path, tmp_path: Path
) -> None:
    code, said = run_llmc_with({}, "verify", damaged(on_vulkan, tmp_path / "a", hashes=False))
    assert code == ArtifactError.exit_code
    assert "model.so" in said
    assert "hint: " in said
    # Whoever changes both meets what is kept beside the kernels.
    code, said = run_llmc_with({}, "verify", damaged(on_vulkan, tmp_path / "b", hashes=True))
    assert code == ArtifactError.exit_code
    assert re.search(r"Vulkan: the SPIR-V of kernel \w+ is damaged", said)
    assert "hint: compile the model again with this version of llmc" in said
