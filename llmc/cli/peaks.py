"""How many operations a second this machine's processors can do, by precision: measured."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from llmc.cpu_features import host_features, num_cores

if TYPE_CHECKING:
    from llmc.targets.cpu.kernels.peak import PeakInstruction

_TURNS = 1 << 20  # of the inner loop: some milliseconds, which no thread's start-up shows in
_RUNS = 20


def peak_operations() -> dict[str, float]:
    """Operations (a multiplication and an addition are two) per second of all cores this process
    may use, for "int8", "bf16" and "f32" factors where the processor has an instruction for them.

    The best of some runs of sixteen independent chains of one instruction on every core, operands
    in registers. Compiles its loops with TVM, which takes seconds.
    """
    rates: dict[str, float] = {}
    for instruction in known_instructions():
        if instruction.precision not in rates:
            rates[instruction.precision] = _measure(instruction)
    return rates


def known_instructions() -> list[PeakInstruction]:
    """Those that this machine's processor has, the fastest of each precision first."""
    from llmc.targets.cpu.kernels.peak import INSTRUCTIONS

    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return [i for i in INSTRUCTIONS if i.machine == machine and i.feature in host_features()]


def build_loop(instruction: PeakInstruction, *, turns: int, tasks: int) -> Callable[..., None]:
    """The compiled loop `(factors, sums)`; see llmc.targets.cpu.kernels.peak."""
    import tvm

    from llmc.targets.cpu.kernels.peak import peak

    triple = _triple(instruction.machine)
    # LLVM would split 512-bit vectors for the sake of CPUs that lower their clock.
    mattr = [f"+{instruction.mattr}", *(["-prefer-256-bit"] if instruction.lanes == 16 else [])]
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mattr": mattr})
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        module = tvm.IRModule({"peak": peak(instruction, turns, tasks, triple)})
        built: Callable[..., None] = tvm.compile(module, target=target)["peak"]
    return built


def _measure(instruction: PeakInstruction) -> float:
    import tvm

    from llmc.targets.cpu.kernels.peak import CHAINS

    tasks = num_cores()
    run = build_loop(instruction, turns=_TURNS, tasks=tasks)
    # Zeros are no special case for these instructions, and no sum overflows or becomes denormal.
    factors = tvm.runtime.tensor(np.zeros((2, instruction.lanes), np.int32))
    sums = tvm.runtime.tensor(np.zeros((tasks, CHAINS, instruction.lanes), instruction.sum_dtype))
    best = float("inf")
    for _ in range(_RUNS):
        start = time.perf_counter()
        run(factors, sums)
        best = min(best, time.perf_counter() - start)
    return tasks * _TURNS * CHAINS * instruction.operations / best


def _triple(machine: str) -> str:
    if platform.system() == "Darwin":
        return {"x86_64": "x86_64-apple-macos13.0", "aarch64": "arm64-apple-macos13.0"}[machine]
    return f"{machine}-unknown-linux-gnu"
