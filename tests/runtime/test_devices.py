"""Which device an artifact runs on, and what a device's errors become."""

from __future__ import annotations

import dataclasses

import pytest
from fake_model import make_manifest

from llmc.artifact import Variant
from llmc.errors import ArtifactError, CapacityError, LlmcError, UsageError
from llmc.runtime.devices import DEVICES, choose_place


def variant(kind: str, *features: str) -> Variant:
    return Variant(library=f"{kind}.so", device_kind=kind, target=kind, features=list(features))


def manifest(*variants: Variant):
    return dataclasses.replace(make_manifest(), variants=list(variants))


def test_without_a_name_the_artifacts_first_kind_is_used() -> None:
    place = choose_place(manifest(variant("cpu")), None)
    assert (place.kind, place.index, place.variant.library) == ("cpu", 0, "cpu.so")
    assert place.device is DEVICES["cpu"]


def test_the_first_variant_that_the_device_satisfies_is_taken() -> None:
    built = manifest(variant("vulkan"), variant("cpu", "no_such_instruction"), variant("cpu"))
    assert choose_place(built, "cpu").variant.features == []
    with pytest.raises(ArtifactError, match="cpu needs no_such_instruction"):
        choose_place(manifest(variant("cpu", "no_such_instruction")), "cpu")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("abacus", "unknown device 'abacus'\nhint: known: cpu, vulkan"),
        ("cpu:one", "device 'cpu:one': 'one' is no number\nhint: for example cpu:0"),
        ("cpu:", "device 'cpu:': '' is no number"),
        ("cpu:-1", "'-1' is no number"),
        ("cpu:1", "there is no device cpu:1"),
    ],
)
def test_devices_that_do_not_exist_are_named(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choose_place(manifest(variant("cpu")), name)


def test_an_artifact_for_other_devices_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ArtifactError, match="built for cpu, not for vulkan\nhint: run it with"):
        choose_place(manifest(variant("cpu")), "vulkan")


@pytest.mark.parametrize(
    ("said", "error", "hint"),
    [
        ("VK_ERROR_OUT_OF_DEVICE_MEMORY: 5 bytes asked", CapacityError, "--kv-cache-tokens"),
        ("vkQueueSubmit returned VK_ERROR_DEVICE_LOST", LlmcError, "start again"),
        ("the SPIR-V of kernel k is damaged", ArtifactError, "compile the model again"),
    ],
)
def test_errors_of_vulkan_become_ours_by_its_own_names(
    said: str, error: type[LlmcError], hint: str
) -> None:
    explained = DEVICES["vulkan"].explain(RuntimeError(f"somewhere: Vulkan: {said}\nmore"))
    assert type(explained) is error
    assert explained.message == f"Vulkan: {said}"
    assert hint in explained.hint
    assert DEVICES["vulkan"].explain(ValueError("something else")) is None
