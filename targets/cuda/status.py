"""What this machine lacks to build and to run CUDA artifacts."""

from __future__ import annotations

from llmc.cuda_toolkit import CUDART, find_cudart
from llmc.targets.cuda.toolkit import NVCC_HINT, find_tool, has_driver
from llmc.targets.status import Lack


def lacks() -> list[Lack]:
    """Nothing where both work."""
    found: list[Lack] = []
    if find_tool("nvcc") is None:
        found.append(Lack(reason="compiling kernels needs nvcc", hint=NVCC_HINT, run=False))
    if find_cudart() is None:
        found.append(Lack(reason=f"{CUDART} was not found", hint=NVCC_HINT))
    if not has_driver():
        found.append(
            Lack(
                reason="no CUDA driver (libcuda.so.1)",
                hint="install NVIDIA's driver 580 or newer",
                build=False,
            )
        )
    return found
