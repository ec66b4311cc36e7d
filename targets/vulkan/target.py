"""Vulkan as a target: kinds of devices as data, the kernels of all GPUs, SPIR-V in the library."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from llmc.errors import UsageError
from llmc.targets.base import KernelRule, ScheduleRule
from llmc.targets.cpu.link import Platform, host_machine, link
from llmc.targets.cpu.target import TRIPLES
from llmc.targets.gpu.kernels.matrix_tile import MatrixTile
from llmc.targets.gpu.parameters import Features, GpuParameters
from llmc.targets.gpu.schedule import schedule_rules
from llmc.targets.gpu.target import GpuTarget
from llmc.targets.vulkan.build import FEATURES, register
from llmc.targets.vulkan.kernels.cooperative_matrix import CooperativeMatrices
from llmc.targets.vulkan.rules import vulkan_rules
from llmc.targets.vulkan.spirv import check_tools

_EXTERNS = ("subgroupAdd", "subgroupMax")


@dataclass(frozen=True, slots=True, kw_only=True)
class VulkanLevel:
    """What kernels may presume of a device; `features` are checked before they are loaded."""

    subgroup: int = 1  # 1: whatever the device has, reductions go through shared memory
    max_threads: int = 256
    shared_bytes: int = 32768
    matrices: bool = False  # products of many tokens by cooperative matrices

    @property
    def features(self) -> list[str]:
        """By the names that the runtime knows."""
        return [f"subgroupSize{self.subgroup}"] if self.subgroup > 1 else []

    @property
    def tile(self) -> MatrixTile | None:
        """Of a product by cooperative matrices: of seven, the fastest on an NVIDIA H200."""
        if not self.matrices:
            return None
        unit = CooperativeMatrices(subgroup=self.subgroup)
        return MatrixTile(unit=unit, rows=64, tokens=64, group_rows=32, group_tokens=16, depth=32)


# Lavapipe has subgroups of 8, Intel's GPUs of 8 to 32, NVIDIA's of 32, AMD's of 32 or 64.
LEVELS: dict[str, VulkanLevel] = {
    "portable": VulkanLevel(),
    "subgroup8": VulkanLevel(subgroup=8),
    "subgroup16": VulkanLevel(subgroup=16),
    "subgroup32": VulkanLevel(subgroup=32),
    "subgroup64": VulkanLevel(subgroup=64),
    "matrix": VulkanLevel(subgroup=32, matrices=True),
}


class VulkanTarget(GpuTarget):
    """Implements llmc.targets.base.Target; raises CompileError where the tools are missing."""

    name = "vulkan"
    device_kind = "vulkan"
    library_name = "model.dylib" if platform.system() == "Darwin" else "model.so"

    def __init__(self, level: str | None = None) -> None:
        name, *others = ("portable" if level is None else level).split(",")
        if name not in LEVELS:
            raise UsageError(
                f"unknown Vulkan level {name!r}",
                hint=f"one or more of {', '.join(LEVELS)}, separated by commas, the best first",
            )
        if len({name, *others}) <= len(others):
            raise UsageError(f"a Vulkan level is named twice in {level!r}")
        self.level = name
        self._presumed = LEVELS[name]
        check_tools(matrices=self._presumed.matrices)  # before minutes of work, not after them
        register()
        # Of an artifact for several levels, the runtime takes the first that a device has.
        self.alternatives = [VulkanTarget(other) for other in others]
        for other, target in zip(others, self.alternatives, strict=True):
            target.library_name = target.library_name.replace("model", f"model-{other}")
        # The library's host code launches kernels, no more: any CPU of the kind runs it.
        self.platform = Platform(machine=host_machine(), system=platform.system())
        triple = TRIPLES[self.platform.machine, self.platform.system]
        self.tvm_target = tvm.target.Target(
            {
                "kind": "vulkan",
                "max_num_threads": self._presumed.max_threads,
                "max_threads_per_block": self._presumed.max_threads,
                "max_shared_memory_per_block": self._presumed.shared_bytes,
                "thread_warp_size": self._presumed.subgroup,
                "supports_float16": True,
                "supports_16bit_buffer": True,
                "supports_int8": True,
                "supports_8bit_buffer": True,
                "supports_int16": True,
                "supports_int64": True,
            },
            host={"kind": "llvm", "mtriple": triple},
        )
        self.pass_options: dict[str, Any] = {}
        features = Features(
            subgroup=self._presumed.subgroup,
            subgroup_extern=_EXTERNS if self._presumed.subgroup > 1 else None,
            max_threads=self._presumed.max_threads,
            shared_bytes=self._presumed.shared_bytes,
        )
        self.parameters = GpuParameters(features=features)
        self.kernel_rules: Sequence[tuple[str, KernelRule]] = vulkan_rules(
            self.parameters, self._presumed.tile, self.few_tokens
        )
        self.schedule_rules: Sequence[tuple[str, ScheduleRule]] = schedule_rules(self.tvm_target)

    def link(self, executable: tvm.runtime.Executable, path: Path) -> list[str]:
        """Links the host code with the SPIR-V inside; what the kernels need of a device."""
        link(executable, path, self.platform, sources=())
        needed = executable.mod.get_function(FEATURES, query_imports=True)
        kernels = [] if needed is None else [str(name) for name in needed()]
        return sorted({*kernels, *self._presumed.features})
