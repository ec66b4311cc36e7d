"""The CPU as a target: instruction-set levels as data, the host's own level by default."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from llmc.cpu_features import host_features
from llmc.errors import UsageError
from llmc.formats import FORMATS, WeightFormat
from llmc.targets.base import (
    ActivationBlocks,
    Array,
    KernelRule,
    Matrix,
    PackedPart,
    Sampling,
    ScheduleRule,
    Target,
)
from llmc.targets.cpu import layout
from llmc.targets.cpu.kernels.integer import activation_block, sum_factor, unit_of
from llmc.targets.cpu.kernels.kv_pages import key_matrix, kv_type, value_matrix
from llmc.targets.cpu.layout import PANEL
from llmc.targets.cpu.link import Platform, host_machine, link
from llmc.targets.cpu.parameters import parameters_for
from llmc.targets.cpu.rules import kernel_rules
from llmc.targets.cpu.sampling import CpuSampling
from llmc.targets.cpu.schedule import schedule_elementwise, schedule_reduction


@dataclass(frozen=True, slots=True, kw_only=True)
class IsaLevel:
    """One instruction-set level; `features` are checked by the runtime before it loads code."""

    machine: str  # platform.machine() of the CPUs it suits
    mcpu: str
    mattr: tuple[str, ...]
    features: tuple[str, ...]


_AVX2 = ("avx2", "bmi1", "bmi2", "f16c", "fma")
_AVX512 = (*_AVX2, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
# LLVM would split 512-bit vectors for the sake of CPUs that lower their clock.
_WIDE = "-prefer-256-bit"
_BF16_CODE = (_WIDE, "+avx512vnni", "+avx512bf16")

_AVX512BF16 = (*_AVX512, "avx512_bf16", "avx512_vnni")
_AMX = ("amx_bf16", "amx_int8", "amx_tile")

# The best level a machine has comes first.
ISA_LEVELS: dict[str, IsaLevel] = {
    "amx": IsaLevel(
        machine="x86_64",
        mcpu="x86-64-v4",
        mattr=(*_BF16_CODE, "+amx-tile", "+amx-int8", "+amx-bf16"),
        features=(*_AVX512BF16, *_AMX),
    ),
    # The same code but for parameters: of processors with AVX-512 this one tells Zen 5 apart.
    "avx512vp2intersect": IsaLevel(
        machine="x86_64",
        mcpu="x86-64-v4",
        mattr=_BF16_CODE,
        features=(*_AVX512BF16, "avx512_vp2intersect"),
    ),
    "avx512bf16": IsaLevel(
        machine="x86_64",
        mcpu="x86-64-v4",
        mattr=_BF16_CODE,
        features=_AVX512BF16,
    ),
    "avx512vnni": IsaLevel(
        machine="x86_64",
        mcpu="x86-64-v4",
        mattr=(_WIDE, "+avx512vnni"),
        features=(*_AVX512, "avx512_vnni"),
    ),
    "avx512": IsaLevel(machine="x86_64", mcpu="x86-64-v4", mattr=(_WIDE,), features=_AVX512),
    "avxvnni": IsaLevel(
        machine="x86_64",
        mcpu="x86-64-v3",
        mattr=("+avxvnni",),
        features=(*_AVX2, "avx_vnni"),
    ),
    "avx2": IsaLevel(machine="x86_64", mcpu="x86-64-v3", mattr=(), features=_AVX2),
    "neon-dotprod": IsaLevel(
        machine="aarch64", mcpu="generic", mattr=("+dotprod",), features=("asimddp",)
    ),
    "neon": IsaLevel(machine="aarch64", mcpu="generic", mattr=(), features=()),
}
TRIPLES = {
    ("x86_64", "Linux"): "x86_64-unknown-linux-gnu",
    ("aarch64", "Linux"): "aarch64-unknown-linux-gnu",
    ("x86_64", "Darwin"): "x86_64-apple-macos13.0",
    ("aarch64", "Darwin"): "arm64-apple-macos13.0",
}


class CpuTarget:
    """Implements llmc.targets.base.Target."""

    name = "cpu"
    device_kind = "cpu"
    layout = layout.LAYOUT
    panel = PANEL
    page_size = 16
    few_tokens = 8
    lazy_memory = True
    level = ""
    alternatives: Sequence[Target] = ()

    def __init__(self, level: str | None = None) -> None:
        machine = host_machine()
        self.isa = _host_level(machine) if level is None else level
        if self.isa not in ISA_LEVELS:
            raise UsageError(
                f"unknown CPU level {level!r}", hint=f"choose one of {', '.join(ISA_LEVELS)}"
            )
        isa = ISA_LEVELS[self.isa]
        self._features = list(isa.features)
        self.platform = Platform(machine=isa.machine, system=platform.system())
        self.library_name = "model.dylib" if self.platform.system == "Darwin" else "model.so"
        description: dict[str, object] = {
            "kind": "llvm",
            "mtriple": TRIPLES[self.platform.machine, self.platform.system],
            "mcpu": isa.mcpu,
            "opt-level": 3,
        }
        if isa.mattr:
            description["mattr"] = list(isa.mattr)
        self.tvm_target = tvm.target.Target(description)
        self.pass_options: dict[str, Any] = {
            # TVM's storage rewriting would move the kernels' accumulators out of registers.
            "config": {"tirx.disable_storage_rewrite": True},
            # There is nothing to make smaller, and finding out takes half of a kernel's time.
            "disabled_pass": ["s_tir.CompactBufferAllocation"],
        }
        self._parameters = parameters_for(self.isa)
        narrow = {"int8": self._parameters.integer, "bfloat16": self._parameters.bfloat16}
        self.narrow_products = frozenset(name for name, has in narrow.items() if has is not None)
        self.lacking_formats = frozenset(f.name for f in FORMATS.values() if f.float_codes)
        self.kernel_rules: Sequence[tuple[str, KernelRule]] = kernel_rules(
            self._parameters, self.few_tokens
        )
        self.schedule_rules: Sequence[tuple[str, ScheduleRule]] = (
            ("cpu.elementwise", schedule_elementwise),
            ("cpu.reduction", schedule_reduction),
        )

    def sampling(self, vocab_size: int) -> Sampling:
        """By all threads: NumPy takes one, and several passes over what may be many megabytes."""
        return CpuSampling(vocab_size, self._parameters.sampling).build()

    def key_page(self, kv_heads: int, head_dim: int, kv_dtype: str) -> list[int]:
        """`[Kv, elements]`, as kernels/kv_pages.py lays them out."""
        kv = kv_type(kv_dtype, self.page_size, head_dim)
        return [kv_heads, key_matrix(kv, head_dim, self.page_size).elements]

    def value_page(self, kv_heads: int, head_dim: int, kv_dtype: str) -> list[int]:
        """`[Kv, elements]` likewise."""
        kv = kv_type(kv_dtype, self.page_size, head_dim)
        return [kv_heads, value_matrix(kv, head_dim, self.page_size).elements]

    def activation_blocks(self, fmt: WeightFormat, features: int) -> ActivationBlocks | None:
        """Blocks as large as the format's groups and the table allow."""
        if self._parameters.integer is None:
            return None
        block = activation_block(fmt, features, self._parameters.integer.block)
        if block is None:
            return None
        return ActivationBlocks(block=block, unit=unit_of(fmt, block), factor=sum_factor(fmt))

    def fuses(self, fmt: WeightFormat, m: int, k: int, max_tokens: int) -> bool:
        """No."""
        return False

    def packed_parts(self, fmt: WeightFormat, shape: Sequence[int]) -> list[PackedPart]:
        """The arrays of layout panel16."""
        *experts, m, k = shape
        return layout.packed_parts(fmt, m, k, num_experts=experts[0] if experts else None)

    def pack(self, fmt: WeightFormat, matrix: Matrix) -> list[Array]:
        """In the same order."""
        return layout.pack(fmt, [matrix])

    def link(self, executable: tvm.runtime.Executable, path: Path) -> list[str]:
        """Links the object code with the thread pool; raises CompileError."""
        link(executable, path, self.platform)
        return self._features


def _host_level(machine: str) -> str:
    """The best level whose features this machine has."""
    present = host_features()
    for name, level in ISA_LEVELS.items():
        if level.machine == machine and present.issuperset(level.features):
            return name
    raise UsageError(
        f"this CPU ({machine}) has none of the levels {', '.join(ISA_LEVELS)}",
        hint="AVX2 with FMA and F16C is the least an x86 CPU needs",
    )
