"""Which level a machine gets, and what a level promises."""

from __future__ import annotations

import pytest

from llmc.errors import UsageError
from llmc.targets.cpu import target as cpu_target
from llmc.targets.cpu.parameters import PARAMETERS
from llmc.targets.cpu.target import ISA_LEVELS, CpuTarget

AVX2 = {"avx2", "bmi1", "bmi2", "f16c", "fma"}
AVX512 = AVX2 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
SAPPHIRE_RAPIDS = {"avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}
ZEN_5 = {"avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_vp2intersect"}
MACHINES = {
    "amx": ("x86_64", AVX512 | SAPPHIRE_RAPIDS),
    "avx512vp2intersect": ("x86_64", AVX512 | ZEN_5),
    "avx512bf16": ("x86_64", AVX512 | {"avx512_vnni", "avx_vnni", "avx512_bf16"}),
    "avx512vnni": ("x86_64", AVX512 | {"avx512_vnni"}),
    "avx512": ("x86_64", AVX512),
    "avxvnni": ("x86_64", AVX2 | {"avx_vnni"}),
    "avx2": ("x86_64", AVX2),
    "neon-dotprod": ("aarch64", {"asimd", "asimddp"}),
    "neon": ("aarch64", {"asimd"}),
}


@pytest.mark.parametrize("level", MACHINES)
def test_a_machine_gets_its_best_level(monkeypatch, level) -> None:
    machine, features = MACHINES[level]
    monkeypatch.setattr(cpu_target, "host_machine", lambda: machine)
    monkeypatch.setattr(cpu_target, "host_features", lambda: frozenset(features))
    assert CpuTarget().isa == level


def test_a_machine_below_all_levels_is_told_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(cpu_target, "host_features", lambda: frozenset({"sse2"}))
    monkeypatch.setattr(cpu_target, "host_machine", lambda: "x86_64")
    with pytest.raises(UsageError, match="none of the levels"):
        CpuTarget()


def test_an_unknown_level_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'sse9'") as caught:
        CpuTarget("sse9")
    assert all(level in str(caught.value.hint) for level in ISA_LEVELS)


def test_every_level_has_its_parameters() -> None:
    assert set(ISA_LEVELS) == set(PARAMETERS) == set(MACHINES)


def test_no_level_decodes_small_floats() -> None:
    assert {name for level in ISA_LEVELS for name in CpuTarget(level).lacking_formats} == {"fp8"}


def test_all_levels_but_plain_neon_multiply_bytes() -> None:
    with_bytes = {level for level in ISA_LEVELS if "int8" in CpuTarget(level).narrow_products}
    assert with_bytes == set(ISA_LEVELS) - {"neon"}
    with_bfloat16 = {
        level for level in ISA_LEVELS if "bfloat16" in CpuTarget(level).narrow_products
    }
    assert with_bfloat16 == {"amx", "avx512vp2intersect", "avx512bf16"}
