"""Where the parts of the CUDA toolkit are: of PyPI's packages, or of NVIDIA's installer."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

CUDART = "libcudart.so.13"
"""What TVM's wheel is linked against."""


def toolkit_folders() -> list[Path]:
    """PyPI's packages first: they are of this environment."""
    spec = importlib.util.find_spec("nvidia")
    packages = [] if spec is None else spec.submodule_search_locations or []
    return [*(Path(folder) / "cu13" for folder in packages), *Path("/usr/local").glob("cuda-13*")]


def find_cudart() -> str | Path | None:
    """libcudart: of a toolkit, or where the linker finds it."""
    for folder in toolkit_folders():
        for place in ("lib", "lib64"):
            if (folder / place / CUDART).exists():
                return folder / place / CUDART
    try:
        ctypes.CDLL(CUDART)
    except OSError:
        return None
    return CUDART
