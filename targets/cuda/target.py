"""CUDA as a target: the kernels of all GPUs, code for several architectures in one library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from llmc.errors import UsageError
from llmc.formats import WeightFormat
from llmc.targets.base import KernelRule, ScheduleRule
from llmc.targets.cpu.link import Platform, host_machine, link
from llmc.targets.cpu.target import TRIPLES
from llmc.targets.cuda.kernels import gemv, wide
from llmc.targets.cuda.launches import await_launches, overlap_launches
from llmc.targets.cuda.parameters import SHARED_KIB
from llmc.targets.cuda.rules import cuda_rules
from llmc.targets.cuda.toolkit import compile_cuda, load_cuda_runtime
from llmc.targets.gpu.parameters import (
    AttentionParameters,
    Features,
    GemvParameters,
    GpuParameters,
)
from llmc.targets.gpu.schedule import schedule_rules
from llmc.targets.gpu.target import GpuTarget

# Ampere and newer; the driver compiles PTX of the newest for what is newer still.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
_DEFAULT = ("sm_80", "sm_90")

# Measured on an H100 and an H200: a block has 32 rows and up to 32 threads for each, so that small
# matrices occupy their 132 multiprocessors; decodes likewise, by parts of a context.
_PARAMETERS = GpuParameters(
    gemv=GemvParameters(splits=32, panels=1),
    few=GemvParameters(splits=8),
    attention=AttentionParameters(decode_parts=16),
)


class CudaTarget(GpuTarget):
    """Implements llmc.targets.base.Target; raises UsageError and CompileError."""

    name = "cuda"
    device_kind = "cuda"
    library_name = "model.so"

    def __init__(self, level: str | None = None) -> None:
        self.architectures = _architectures(level)
        load_cuda_runtime()
        self.platform = Platform(machine=host_machine(), system="Linux")
        self.tvm_target = tvm.target.Target(
            {
                "kind": "cuda",
                "arch": self.architectures[0],
                "max_threads_per_block": 1024,
                "max_shared_memory_per_block": 49152,
                "thread_warp_size": 32,
            },
            host={
                "kind": "llvm",
                "mtriple": TRIPLES[self.platform.machine, self.platform.system],
            },
        )
        self.pass_options: dict[str, Any] = {}
        features = Features(subgroup=32, max_threads=1024, shared_bytes=49152)
        self.parameters = replace(_PARAMETERS, features=features)
        self.kernel_rules: Sequence[tuple[str, KernelRule]] = cuda_rules(
            self.parameters,
            self.few_tokens,
            min(SHARED_KIB[architecture] for architecture in self.architectures) * 1024,
            self._hopper,
        )
        self.schedule_rules: Sequence[tuple[str, ScheduleRule]] = schedule_rules(self.tvm_target)
        # TVM asks this function, which is one for the process, for the code of every module.
        architectures = self.architectures
        tvm_ffi.register_global_func(
            "tvm_callback_cuda_compile",
            lambda code: compile_cuda(await_launches(str(code)), architectures),
            override=True,
        )
        overlap_launches(ARCHITECTURES.index(architectures[0]) >= ARCHITECTURES.index("sm_90"))

    @property
    def _hopper(self) -> bool:
        return self.architectures == ("sm_90",)

    def fuses(self, fmt: WeightFormat, m: int, k: int, max_tokens: int) -> bool:
        """What kernels/gemv.py takes, and of many tokens wide.py."""
        if max_tokens == 1:
            return gemv.takes(fmt, m, k)
        return self._hopper and max_tokens > self.few_tokens and wide.takes(fmt, m, gate=True)

    def link(self, executable: tvm.runtime.Executable, path: Path) -> list[str]:
        """Links the host code with the device's inside; the oldest architecture it runs on."""
        link(executable, path, self.platform, sources=())
        return [self.architectures[0]]


def _architectures(level: str | None) -> tuple[str, ...]:
    """`sm_80,sm_90` as a tuple, oldest first."""
    if level is None:
        return _DEFAULT
    names = level.split(",")
    for name in names:
        if not re.fullmatch("sm_[0-9]{2,3}", name) or name not in ARCHITECTURES:
            raise UsageError(
                f"unknown CUDA architecture {name!r}",
                hint=f"one or more of {', '.join(ARCHITECTURES)}, separated by commas",
            )
    return tuple(sorted(set(names), key=ARCHITECTURES.index))
