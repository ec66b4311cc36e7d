"""NVIDIA's GPUs as the runtime sees them, on a machine without one."""

from __future__ import annotations

import dataclasses

import pytest
from fake_model import make_manifest

from llmc.artifact import Manifest, Variant
from llmc.errors import ArtifactError
from llmc.runtime.devices import choose_place
from llmc.runtime.devices import cuda as module


def built_for(spec: str, *features: str) -> Manifest:
    variant = Variant(library="model.so", device_kind="cuda", target=spec, features=list(features))
    return dataclasses.replace(make_manifest(), variants=[variant])


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with a GPU of the compute version that the dict holds."""
    device = {"version": "9.0"}
    monkeypatch.setattr(module.Cuda, "prepare", lambda self, index: None)
    monkeypatch.setattr(module, "_attribute", lambda index, kind: device["version"])
    return device


@pytest.mark.parametrize("version", ["8.0", "8.6", "9.0", "12.0", "12.1"])
def test_devices_run_code_of_their_own_and_older_architectures(a_gpu, version: str) -> None:
    a_gpu["version"] = version
    manifest = built_for("cuda:sm_80", "sm_80")
    assert choose_place(manifest, None).variant is manifest.variants[0]


@pytest.mark.parametrize(
    ("version", "spec", "oldest"),
    [("7.5", "cuda:sm_80,sm_90", "sm_80"), ("8.6", "cuda:sm_90", "sm_90")],
)
def test_a_device_older_than_all_code_is_refused_before_any_is_loaded(
    a_gpu, version: str, spec: str, oldest: str
) -> None:
    a_gpu["version"] = version
    with pytest.raises(ArtifactError) as caught:
        choose_place(built_for(spec, oldest), None)
    assert caught.value.message == (
        f"this machine's cuda lacks what the artifact was built for: {spec} needs {oldest}"
    )
    assert "compile the model again" in (caught.value.hint or "")
