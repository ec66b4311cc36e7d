"""The targets llmc compiles for, as a table, and what each has and lacks on this machine."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.errors import UsageError

if TYPE_CHECKING:
    from llmc.targets.base import Target

_COMPILE_PACKAGES = ("accelerate", "gguf", "huggingface_hub", "onnx", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetEntry:
    """One target: the functions of TVM that must exist to build for it and to run it."""

    name: str
    code_generator: str  # TVM's global function that builds device code
    device: str  # TVM's name of the device
    implementation: str  # module:class, imported when the target is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStatus:
    """What this machine can do with a target; `reasons` say what it lacks, `hint` how to get it."""

    name: str
    can_build: bool
    can_run: bool
    reasons: list[str]
    hint: str  # empty where nothing is missing


TARGETS: dict[str, TargetEntry] = {
    entry.name: entry
    for entry in (
        TargetEntry(
            name="cpu",
            code_generator="target.build.llvm",
            device="cpu",
            implementation="llmc.targets.cpu.target:CpuTarget",
        ),
    )
}


def open_target(spec: str) -> Target:
    """The target named by `NAME` or `NAME:LEVEL`; raises UsageError naming those that exist."""
    name, _, level = spec.partition(":")
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}", hint=f"choose one of {', '.join(TARGETS)}")
    module, _, attribute = TARGETS[name].implementation.partition(":")
    target: Target = getattr(importlib.import_module(module), attribute)(level or None)
    return target


def list_targets() -> list[TargetStatus]:
    """The state of every target on this machine, in the table's order."""
    return [_status(entry) for entry in TARGETS.values()]


def _status(entry: TargetEntry) -> TargetStatus:
    missing = [name for name in _COMPILE_PACKAGES if importlib.util.find_spec(name) is None]
    reasons = [f"compiling needs {name}, which is not installed" for name in missing]
    # A second or two: only this question needs TVM, the table does not.
    import tvm

    has_generator = tvm.get_global_func(entry.code_generator, allow_missing=True) is not None
    if not has_generator:
        reasons.append(f"this TVM has no {entry.code_generator}")
    has_runtime = tvm.get_global_func(f"device_api.{entry.device}", allow_missing=True) is not None
    exists = has_runtime and bool(tvm.device(entry.device).exist)
    if not exists:
        reasons.append(f"no {entry.device} device was found")
    return TargetStatus(
        name=entry.name,
        can_build=has_generator and not missing,
        can_run=exists,
        reasons=reasons,
        hint='pip install "llmc[compile]"' if missing else "",
    )
