"""Apple's GPUs as the runtime sees them, on a machine that is no Mac."""

from __future__ import annotations

import dataclasses
import platform

import pytest
from fake_model import make_manifest

from llmc.artifact import Variant
from llmc.errors import ArtifactError, CapacityError, LlmcError
from llmc.runtime.devices import DEVICES, choose_place
from llmc.runtime.devices import metal as module

BUILT = Variant(
    library="model.dylib",
    device_kind="metal",
    target="metal",
    features=["apple7", "arm64", "macos13"],
)


@pytest.mark.parametrize("here", [("Linux", "x86_64"), ("Darwin", "x86_64"), ("Linux", "aarch64")])
def test_other_machines_are_told_what_the_artifact_was_built_for(monkeypatch, here) -> None:
    monkeypatch.setattr(platform, "system", lambda: here[0])
    monkeypatch.setattr(platform, "machine", lambda: here[1])
    manifest = dataclasses.replace(make_manifest(), variants=[BUILT])
    with pytest.raises(ArtifactError, match="macOS with Apple's processors") as caught:
        choose_place(manifest, None)
    assert " ".join(here) in caught.value.message
    assert "--target" in (caught.value.hint or "")


@pytest.fixture
def a_mac(monkeypatch):
    """A machine that says it is one; memory and release as given by the dict."""
    machine = {"release": "14.5", "recommended": 12 << 30}
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "mac_ver", lambda: (machine["release"], ("", "", ""), "arm64"))
    monkeypatch.setattr(module.tvm_runtime, "load_library", lambda _: None)
    monkeypatch.setattr(module, "available_host_bytes", lambda: 20 << 30)

    def attribute(index, kind):
        exists = int(index == 0)
        return {module._EXISTS: exists, module._TOTAL_GLOBAL_MEMORY: machine["recommended"]}[kind]

    monkeypatch.setattr(module, "_attribute", attribute)
    return machine


def test_a_mac_runs_what_was_built_for_its_system_or_an_older_one(a_mac) -> None:
    manifest = dataclasses.replace(make_manifest(), variants=[BUILT])
    assert choose_place(manifest, None).kind == "metal"
    newer = dataclasses.replace(BUILT, features=["macos15"])
    with pytest.raises(ArtifactError, match="metal needs macos15"):
        choose_place(dataclasses.replace(manifest, variants=[newer]), "metal:0")
    a_mac["release"] = "12.7.6"
    with pytest.raises(ArtifactError, match="metal needs macos13"):
        choose_place(manifest, "metal")


def test_a_mac_has_one_gpu(a_mac) -> None:
    manifest = dataclasses.replace(make_manifest(), variants=[BUILT])
    with pytest.raises(LlmcError, match="there is no device metal:1"):
        choose_place(manifest, "metal:1")


@pytest.mark.parametrize(("recommended", "expected"), [(12, 12), (40, 20), (0, 20)])
def test_memory_is_what_metal_recommends_and_the_system_has(a_mac, recommended, expected) -> None:
    a_mac["recommended"] = recommended << 30
    assert DEVICES["metal"].available_bytes(0) == expected << 30


@pytest.mark.parametrize(
    ("said", "error", "hint"),
    [
        ("Fail to compile metal source:program_source:3:1: error: x", ArtifactError, "macOS 13"),
        ("GPUError: Insufficient Memory (00000008:kIOGPU…)", CapacityError, "--kv-cache-tokens"),
        ("GPUError after kernel gemv: Caused GPU Hang Error", LlmcError, "start again"),
        (
            "Check failed: (blockSize <= maxTotalThreadsPerThreadgroup",
            ArtifactError,
            "compile the model again",
        ),
    ],
)
def test_errors_of_metal_become_ours(said, error, hint) -> None:
    explained = DEVICES["metal"].explain(RuntimeError(f"InternalError: {said}\nand more"))
    assert type(explained) is error
    assert hint in (explained.hint or "")
    assert "and more" not in explained.message
    assert DEVICES["metal"].explain(ValueError("something else")) is None
