"""Metal as a target: the kernels of all GPUs as sources that macOS compiles, in a library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from llmc.errors import UsageError
from llmc.targets.base import KernelRule, ScheduleRule
from llmc.targets.cpu.link import Platform, check_compiler, link
from llmc.targets.cpu.target import TRIPLES
from llmc.targets.gpu.parameters import AttentionParameters, Features, GpuParameters
from llmc.targets.gpu.schedule import schedule_rules
from llmc.targets.gpu.target import GpuTarget
from llmc.targets.metal.parameters import SIMDGROUP, TILE
from llmc.targets.metal.rules import metal_rules
from llmc.targets.metal.source import MAX_THREADS, THREADGROUP_BYTES, check_source

PLATFORM = Platform(machine="aarch64", system="Darwin")
"""Macs whose GPU has simdgroup matrices: all with a processor of Apple's."""
FEATURES = ("apple7", "arm64", "macos13")
"""What libraries need, by names that the runtime knows: the GPU, the processor, the system."""

# Not measured, for want of a device. A decode of one sequence has eight blocks a K/V head: Apple's
# GPUs have 8 to 80 cores.
PARAMETERS = GpuParameters(
    features=Features(
        subgroup=SIMDGROUP,
        subgroup_extern=("simd_sum", "simd_max"),
        max_threads=MAX_THREADS,
        shared_bytes=THREADGROUP_BYTES,
    ),
    attention=AttentionParameters(decode_parts=8),
)


class MetalTarget(GpuTarget):
    """Implements llmc.targets.base.Target; raises UsageError and CompileError."""

    name = "metal"
    device_kind = "metal"
    library_name = "model.dylib"

    def __init__(self, level: str | None = None) -> None:
        if level is not None:
            raise UsageError(
                f"unknown Metal level {level!r}", hint="there is one: --target metal, without ':'"
            )
        check_compiler(PLATFORM)  # before minutes of work, not after them
        self.tvm_target = tvm.target.Target(
            {
                "kind": "metal",
                "max_threads_per_block": MAX_THREADS,
                "max_shared_memory_per_block": THREADGROUP_BYTES,
                "thread_warp_size": SIMDGROUP,
            },
            host={
                "kind": "llvm",
                "mtriple": TRIPLES[PLATFORM.machine, PLATFORM.system],
                "mcpu": "apple-m1",
            },
        )
        self.pass_options: dict[str, Any] = {}
        self.parameters = PARAMETERS
        self.kernel_rules: Sequence[tuple[str, KernelRule]] = metal_rules(
            self.parameters, TILE, self.few_tokens
        )
        self.schedule_rules: Sequence[tuple[str, ScheduleRule]] = schedule_rules(self.tvm_target)
        # TVM shows this function, which is one for the process, the source of every kernel.
        tvm_ffi.register_global_func(
            "tvm_callback_metal_compile",
            lambda source, _: (check_source(str(source)), "metal"),
            override=True,
        )

    def link(self, executable: tvm.runtime.Executable, path: Path) -> list[str]:
        """Links the host code with the kernels' sources inside; what they need of a machine."""
        link(executable, path, PLATFORM, sources=())
        return list(FEATURES)
