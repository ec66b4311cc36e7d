"""Kernels of a level, run on this machine where it has the level."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from matrices import tensor

from llmc.cpu_features import host_features
from llmc.targets.cpu.target import ISA_LEVELS, CpuTarget


def require_level(level: str) -> None:
    """Skips the test where this machine cannot run the level's code: other machines do."""
    if not host_features().issuperset(ISA_LEVELS[level].features):
        pytest.skip(f"this CPU is not of level {level}")


class HostLibrary:
    """The kernels of a level; the test is skipped on machines of another."""

    def __init__(self, functions: dict[str, tvm.tirx.PrimFunc], level: str) -> None:
        require_level(level)
        named = {n: f.with_attr("global_symbol", n) for n, f in functions.items()}
        target = CpuTarget(level)
        with tvm.transform.PassContext(**target.pass_options):
            self._module = tvm.compile(tvm.IRModule(named), target=target.tvm_target)
        self.assembly = self._module.mod.inspect_source("asm")

    def run(self, name: str, *arrays: np.ndarray) -> np.ndarray:
        """The last array, as the kernel leaves it."""
        return self.run_all(name, *arrays)[-1]

    def run_all(self, name: str, *arrays: np.ndarray) -> list[np.ndarray]:
        """All arrays likewise."""
        tensors = [tensor(a) for a in arrays]
        self._module[name](*tensors)
        return [t.numpy() for t in tensors]
