"""The targets llmc compiles for, as a table, and what each has and lacks on this machine."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmc.errors import UsageError
from llmc.targets.status import Lack, TargetStatus

if TYPE_CHECKING:
    from llmc.targets.base import Target

_COMPILE_PACKAGES = ("accelerate", "gguf", "huggingface_hub", "onnx", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetEntry:
    """One target; modules are imported when they are asked for, `module:name` each."""

    name: str
    implementation: str  # a class, see llmc.targets.base.Target
    lacks: str  # a function without arguments that returns a list of Lack


TARGETS: dict[str, TargetEntry] = {
    entry.name: entry
    for entry in (
        TargetEntry(
            name="cpu",
            implementation="llmc.targets.cpu.target:CpuTarget",
            lacks="llmc.targets.cpu.status:lacks",
        ),
        TargetEntry(
            name="cuda",
            implementation="llmc.targets.cuda.target:CudaTarget",
            lacks="llmc.targets.cuda.status:lacks",
        ),
        TargetEntry(
            name="metal",
            implementation="llmc.targets.metal.target:MetalTarget",
            lacks="llmc.targets.metal.status:lacks",
        ),
        TargetEntry(
            name="rocm",
            implementation="llmc.targets.rocm.target:RocmTarget",
            lacks="llmc.targets.rocm.status:lacks",
        ),
        TargetEntry(
            name="vulkan",
            implementation="llmc.targets.vulkan.target:VulkanTarget",
            lacks="llmc.targets.vulkan.status:lacks",
        ),
    )
}


def open_target(spec: str) -> Target:
    """The target named by `NAME` or `NAME:LEVEL`; raises UsageError naming those that exist."""
    name, _, level = spec.partition(":")
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}", hint=f"choose one of {', '.join(TARGETS)}")
    target: Target = _load(TARGETS[name].implementation)(level or None)
    return target


def list_targets() -> list[TargetStatus]:
    """The state of every target on this machine, in the table's order."""
    missing = [name for name in _COMPILE_PACKAGES if importlib.util.find_spec(name) is None]
    packages = [
        Lack(
            reason=f"compiling needs {name}, which is not installed",
            hint='pip install "llmc[compile]"',
            run=False,
        )
        for name in missing
    ]
    return [_status(entry, packages) for entry in TARGETS.values()]


def _status(entry: TargetEntry, packages: list[Lack]) -> TargetStatus:
    lacks: list[Lack] = [*packages, *_load(entry.lacks)()]
    return TargetStatus(
        name=entry.name,
        can_build=not any(lack.build for lack in lacks),
        can_run=not any(lack.run for lack in lacks),
        reasons=[lack.reason for lack in lacks],
        hint="; ".join(dict.fromkeys(lack.hint for lack in lacks if lack.hint)),
    )


def _load(place: str) -> Any:  # noqa: ANN401 - a class or a function
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
