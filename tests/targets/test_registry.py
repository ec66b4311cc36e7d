from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types

import pytest

from llmc.targets import registry
from llmc.targets.status import Lack


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
    (cpu,) = [status for status in registry.list_targets() if status.name == "cpu"]
    assert not cpu.can_build
    assert cpu.can_run
    assert cpu.reasons == ["compiling needs torch, which is not installed"]
    assert 'pip install "llmc[compile]"' in cpu.hint


def test_what_a_target_lacks_says_what_works_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = [
        Lack(reason="no tools", hint="install tools", run=False),
        Lack(reason="old tools", hint="install tools", run=False),
        Lack(reason="no driver", hint="install a driver", build=False),
    ]
    half = types.ModuleType("half_a_target")
    half.lacks = lambda: lacks[:2]
    half.lacks_all = lambda: lacks
    monkeypatch.setitem(sys.modules, "half_a_target", half)
    entries = [
        registry.TargetEntry(name=name, implementation="nowhere:X", lacks=f"half_a_target:{name}")
        for name in ("lacks", "lacks_all")
    ]
    monkeypatch.setattr(registry, "TARGETS", {entry.name: entry for entry in entries})
    tools, everything = registry.list_targets()
    assert (tools.can_build, tools.can_run) == (False, True)
    assert (everything.can_build, everything.can_run) == (False, False)
    assert everything.reasons == ["no tools", "old tools", "no driver"]
    assert everything.hint == "install tools; install a driver"


def test_a_machine_without_a_vulkan_driver_is_told_what_brings_one() -> None:
    code = r"""
import sys
from llmc.targets.registry import list_targets
[vulkan] = [status for status in list_targets() if status.name == "vulkan"]
print(vulkan.can_run, "|".join(vulkan.reasons), vulkan.hint, sep="\n")
"""
    none = {"VK_ICD_FILENAMES": "/none", "VK_DRIVER_FILES": "/none"}
    out = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **none},
    ).stdout.splitlines()
    assert out[0] == "False"
    assert out[1] != ""
    assert "apt-get install" in out[2]
