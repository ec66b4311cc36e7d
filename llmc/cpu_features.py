"""What the CPU of this machine can do, asked of the operating system."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path


@cache
def host_features() -> frozenset[str]:
    """Feature names as Linux prints them in /proc/cpuinfo ("avx2", "fma", "f16c", "avx512f", …)."""
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
        result = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
        names += result.stdout.lower().split()
    return frozenset(n.replace("avx1.0", "avx") for n in names)


def num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
