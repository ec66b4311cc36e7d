"""The CUDA C++ that kernels call: what all share first, then the kernel's own file."""

from __future__ import annotations

from functools import cache
from pathlib import Path

NAMES = {"float32": "float", "float16": "half", "bfloat16": "__nv_bfloat16"}
"""Element types in CUDA C++."""


@cache
def source(name: str) -> str:
    """The text of NAME.cuh with all it needs."""
    folder = Path(__file__).parent
    files = (folder / "fragments.cuh", folder / f"{name}.cuh")
    return "".join(file.read_text(encoding="utf-8") for file in files)
