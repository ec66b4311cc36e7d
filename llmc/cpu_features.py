"""What the CPU of this machine can do, asked of the operating system."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

# Linux on x86-64: asm/prctl.h, and the number of the matrix registers' state (Intel SDM, XCR0).
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_TILE_DATA = 18

# macOS's names of arm64 features, and Linux's.
_MACOS_ARM = (("hw.optional.arm.FEAT_DotProd", "asimddp"),)


@cache
def host_features() -> frozenset[str]:
    """What code in this process may use, by the names that Linux prints in /proc/cpuinfo ("avx2",
    "fma", "f16c", "avx512f", …).

    Matrix registers (amx_…) fault in a process until it has asked for them. The first call asks,
    for all threads and for children; where the system refuses, they are left out.
    """
    return _listed_features() - withheld_features()


@cache
def withheld_features() -> frozenset[str]:
    """What the CPU has and the operating system refuses to this process."""
    tiles = frozenset(name for name in _listed_features() if name.startswith("amx_"))
    return tiles if tiles and not _request_tiles() else frozenset()


def _request_tiles() -> bool:
    """Asks Linux for the matrix registers, whose state makes a thread's signal frames larger."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = libc.syscall(
        *(ctypes.c_long(n) for n in (_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA))
    )
    return bool(code == 0)


@cache
def _listed_features() -> frozenset[str]:
    if platform.system() == "Darwin":
        return _macos_features()
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return frozenset()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def _macos_features() -> frozenset[str]:
    names = []
    for key in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
        names += _sysctl(key).lower().split()
    names += [name for key, name in _MACOS_ARM if _sysctl(key) == "1"]
    return frozenset(n.replace("avx1.0", "avx") for n in names)


def _sysctl(key: str) -> str:
    result = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
