"""How many operations a second this machine's processors can do, by precision: measured."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING

import numpy as np

from llmc.cpu_features import host_features, num_cores

if TYPE_CHECKING:
    from llmc.targets.cpu.kernels.peak import PeakInstruction

METHOD = (
    "best of 5 runs of 16 independent chains of one instruction on every core, operands in "
    "registers"
)
_TURNS = 1 << 20  # of the inner loop: some milliseconds, which no thread's start-up shows in
_RUNS = 5


def peak_operations() -> dict[str, float]:
    """Operations (a multiplication and an addition are two) per second of all cores this process
    may use, for "int8", "bf16" and "f32" factors where the processor has an instruction for them.

    Compiles its loops with TVM (seconds); empty where TVM has no code for this machine.
    """
    from llmc.targets.cpu.kernels.peak import INSTRUCTIONS

    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    rates: dict[str, float] = {}
    for instruction in INSTRUCTIONS:
        known = instruction.machine == machine and instruction.feature in host_features()
        if known and instruction.precision not in rates:
            rates[instruction.precision] = _measure(instruction)
    return rates


def _measure(instruction: PeakInstruction) -> float:
    import tvm

    from llmc.targets.cpu.kernels.peak import CHAINS, peak

    tasks, triple = num_cores(), _triple(instruction.machine)
    # LLVM would split 512-bit vectors for the sake of CPUs that lower their clock.
    mattr = [f"+{instruction.mattr}", *(["-prefer-256-bit"] if instruction.lanes == 16 else [])]
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mattr": mattr})
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        module = tvm.IRModule({"peak": peak(instruction, _TURNS, tasks, triple)})
        built = tvm.compile(module, target=target)
    # Zeros are no special case for these instructions, and no sum overflows or becomes denormal.
    factors = tvm.runtime.tensor(np.zeros((2, instruction.lanes), np.int32))
    sums = tvm.runtime.tensor(np.zeros((tasks, CHAINS, instruction.lanes), instruction.sum_dtype))
    run = built["peak"]
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
