"""ROCm as a target: the kernels of all GPUs, code for one or several architectures in one library.

The architectures of an artifact have to be of one family: wavefronts of the same width and the same
matrix instructions make the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tvm

from llmc.errors import CompileError, UsageError
from llmc.targets.base import KernelRule, ScheduleRule
from llmc.targets.cpu.link import Platform, host_machine, link
from llmc.targets.cpu.target import TRIPLES
from llmc.targets.gpu.schedule import schedule_rules
from llmc.targets.gpu.target import GpuTarget
from llmc.targets.rocm.code_objects import compiling_for, register
from llmc.targets.rocm.linker import LINKER_HINT, find_linker
from llmc.targets.rocm.parameters import FAMILIES, PARAMETERS, Family
from llmc.targets.rocm.rules import rocm_rules

_DEFAULT = "gfx942"


class RocmTarget(GpuTarget):
    """Implements llmc.targets.base.Target; raises UsageError and CompileError."""

    name = "rocm"
    device_kind = "rocm"
    library_name = "model.so"

    def __init__(self, level: str | None = None) -> None:
        family, self.architectures = _architectures(level or _DEFAULT)
        if find_linker() is None:  # before minutes of work, not after them
            raise CompileError(
                "building for ROCm needs ld.lld, which was not found", hint=LINKER_HINT
            )
        register(self.architectures)
        self.platform = Platform(machine=host_machine(), system="Linux")
        with compiling_for(family.features.max_threads):
            self.tvm_target = tvm.target.Target(
                {
                    "kind": "rocm",
                    "mcpu": self.architectures[0],
                    "max_num_threads": family.features.max_threads,
                    "max_threads_per_block": family.features.max_threads,
                    "max_shared_memory_per_block": family.features.shared_bytes,
                    "thread_warp_size": family.features.subgroup,
                },
                host={
                    "kind": "llvm",
                    "mtriple": TRIPLES[self.platform.machine, self.platform.system],
                },
            )
        self.pass_options: dict[str, Any] = {}
        self.parameters = replace(PARAMETERS, features=family.features)
        self.kernel_rules: Sequence[tuple[str, KernelRule]] = rocm_rules(
            self.parameters, family.matrix, self.few_tokens
        )
        self.schedule_rules: Sequence[tuple[str, ScheduleRule]] = schedule_rules(self.tvm_target)

    def link(self, executable: tvm.runtime.Executable, path: Path) -> list[str]:
        """Links the host code with the device's inside; the architectures that it runs on."""
        link(executable, path, self.platform, sources=())
        return [" or ".join(self.architectures)]


def _architectures(level: str) -> tuple[Family, tuple[str, ...]]:
    """`gfx90a,gfx942` as a tuple in the table's order, and their family."""
    known = [name for family in FAMILIES for name in family.architectures]
    names = level.split(",")
    for name in names:
        if name not in known:
            raise UsageError(
                f"unknown ROCm architecture {name!r}",
                hint=f"one or more of {', '.join(known)}, separated by commas",
            )
    families = [f for f in FAMILIES if set(f.architectures) & set(names)]
    if len(families) > 1:
        both = " and ".join(", ".join(f.architectures) for f in families)
        raise UsageError(
            f"{level}: one artifact cannot serve both {both}, whose wavefronts differ",
            hint="compile an artifact for each of them",
        )
    [family] = families
    return family, tuple(name for name in family.architectures if name in names)
