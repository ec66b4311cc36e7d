from __future__ import annotations

import importlib.util

import pytest

from llmc.targets import registry


def test_the_cpu_target_can_build_and_run_here() -> None:
    (cpu,) = [status for status in registry.list_targets() if status.name == "cpu"]
    assert cpu.can_build
    assert cpu.can_run
    assert cpu.reasons == []
    assert cpu.hint == ""


def test_a_machine_without_the_compile_extra_can_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    (cpu,) = registry.list_targets()
    assert not cpu.can_build
    assert cpu.can_run
    assert cpu.reasons == ["compiling needs torch, which is not installed"]
    assert 'pip install "llmc[compile]"' in cpu.hint


def test_a_tvm_without_the_parts_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = registry.TargetEntry(
        name="x",
        code_generator="target.build.no_such",
        device="opencl",
        implementation="nowhere:Nothing",
    )
    monkeypatch.setattr(registry, "TARGETS", {"x": foreign})
    (status,) = registry.list_targets()
    assert not status.can_build
    assert not status.can_run
    assert len(status.reasons) == 2
