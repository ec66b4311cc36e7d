"""What this machine's processor may do, as far as the operating system lets it."""

from __future__ import annotations

import dataclasses
import platform
import sys

import pytest
from fake_model import make_manifest

from llmc import cpu_features
from llmc.artifact import Variant
from llmc.errors import ArtifactError
from llmc.runtime.devices import choose_place

TILES = frozenset({"amx_bf16", "amx_int8", "amx_tile"})
LISTED = TILES | {"avx2", "fma"}


@pytest.fixture
def machine(monkeypatch):
    """machine(features, granted): as if this were one with those features."""

    def pretend(features: frozenset[str], granted: bool) -> list[bool]:
        asked: list[bool] = []

        def request() -> bool:
            asked.append(granted)
            return granted

        monkeypatch.setattr(cpu_features, "_listed_features", lambda: features)
        monkeypatch.setattr(cpu_features, "_request_tiles", request)
        cpu_features.host_features.cache_clear()
        cpu_features.withheld_features.cache_clear()
        return asked

    yield pretend
    cpu_features.host_features.cache_clear()
    cpu_features.withheld_features.cache_clear()


def manifest():
    variant = Variant(
        library="model.so", device_kind="cpu", target="cpu:amx", features=["fma", *sorted(TILES)]
    )
    return dataclasses.replace(make_manifest(), variants=[variant])


def test_matrix_registers_are_asked_for_once(machine) -> None:
    asked = machine(LISTED, True)
    assert cpu_features.host_features() == LISTED
    assert cpu_features.host_features() == LISTED
    assert asked == [True]
    assert choose_place(manifest(), "cpu").variant.target == "cpu:amx"


def test_a_processor_without_them_is_not_asked(machine) -> None:
    asked = machine(frozenset({"avx2"}), False)
    assert cpu_features.host_features() == {"avx2"}
    assert asked == []


def test_what_the_system_refuses_is_not_used(machine) -> None:
    machine(LISTED, False)
    assert cpu_features.host_features() == {"avx2", "fma"}
    with pytest.raises(ArtifactError, match="may not use amx_bf16, amx_int8, amx_tile") as caught:
        choose_place(manifest(), "cpu")
    assert "the operating system refuses them" in str(caught.value.hint)


def test_what_the_processor_lacks_is_named(machine) -> None:
    machine(frozenset({"avx2"}), True)
    with pytest.raises(ArtifactError, match="cpu:amx needs fma, amx_bf16") as caught:
        choose_place(manifest(), "cpu")
    assert "compile the model again" in str(caught.value.hint)


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="a request to Linux on x86-64"
)
def test_the_request_reaches_the_kernel() -> None:
    """Linux answers on any processor, with a refusal where there are no such registers."""
    has_tiles = "amx_tile" in cpu_features._listed_features()
    assert has_tiles or not cpu_features._request_tiles()


def test_macos_answers_by_its_own_names(monkeypatch) -> None:
    answers = {
        "machdep.cpu.features": "FPU AVX1.0 FMA",
        "machdep.cpu.leaf7_features": "AVX2 BMI1",
        "hw.optional.arm.FEAT_DotProd": "1",
    }
    monkeypatch.setattr(cpu_features, "_sysctl", lambda key: answers.get(key, ""))
    assert cpu_features._macos_features() == {"fpu", "avx", "fma", "avx2", "bmi1", "asimddp"}
    monkeypatch.setattr(cpu_features, "_sysctl", lambda _: "")
    assert cpu_features._macos_features() == frozenset()
