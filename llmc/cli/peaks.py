"""How many operations a second this machine's processors can do, by precision: measured."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from llmc.cpu_features import host_features, num_cores

if TYPE_CHECKING:
    import tvm

    from llmc.targets.cpu.kernels.peak import PeakInstruction, TileInstruction

_TURNS = 1 << 20  # of the inner loop: some milliseconds, which no thread's start-up shows in
_RUNS = 20


def peak_operations() -> dict[str, float]:
    """Operations (a multiplication and an addition are two) per second of all cores this process
    may use, for "int8", "bf16" and "f32" factors where the processor has an instruction for them.

    The best of some runs of independent chains of one instruction on every core, operands in
    registers; of vectors and of matrix registers, whichever is faster. Compiles its loops with TVM,
    which takes seconds.
    """
    rates: dict[str, float] = {}
    for instruction in known_instructions():
        if instruction.precision not in rates:
            rates[instruction.precision] = _measure(instruction)
    for tiles in known_tile_instructions():
        rates[tiles.precision] = max(rates.get(tiles.precision, 0.0), _measure_tiles(tiles))
    return rates


def known_instructions() -> list[PeakInstruction]:
    """Those that this machine's processor has, the fastest of each precision first."""
    from llmc.targets.cpu.kernels.peak import INSTRUCTIONS

    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return [i for i in INSTRUCTIONS if i.machine == machine and i.feature in host_features()]


def known_tile_instructions() -> list[TileInstruction]:
    """Those that this machine's processor has and the system allows."""
    from llmc.targets.cpu.kernels.peak import TILE_INSTRUCTIONS

    present = host_features()
    return [i for i in TILE_INSTRUCTIONS if present.issuperset({"amx_tile", i.feature})]


def build_loop(instruction: PeakInstruction, *, turns: int, tasks: int) -> Callable[..., None]:
    """The compiled loop `(factors, sums)`; see llmc.targets.cpu.kernels.peak."""
    import tvm

    from llmc.targets.cpu.kernels.peak import peak

    triple = _triple(instruction.machine)
    # LLVM would split 512-bit vectors for the sake of CPUs that lower their clock.
    mattr = [f"+{instruction.mattr}", *(["-prefer-256-bit"] if instruction.words == 16 else [])]
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mattr": mattr})
    return _built(peak(instruction, turns, tasks, triple), target)


def build_tile_loop(instruction: TileInstruction, *, turns: int, tasks: int) -> Callable[..., None]:
    """The compiled loop `(factors, sums)` on matrix registers."""
    import tvm

    from llmc.targets.cpu.kernels.peak import tile_peak

    mattr = ["+amx-tile", "+amx-int8", "+amx-bf16"]
    target = tvm.target.Target({"kind": "llvm", "mtriple": _triple("x86_64"), "mattr": mattr})
    return _built(tile_peak(instruction, turns, tasks), target)


def _built(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> Callable[..., None]:
    import tvm

    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        built: Callable[..., None] = tvm.compile(tvm.IRModule({"peak": func}), target=target)[
            "peak"
        ]
    return built


def _measure(instruction: PeakInstruction) -> float:
    import tvm

    tasks = num_cores()
    run = build_loop(instruction, turns=_TURNS, tasks=tasks)
    # Zeros are no special case for these instructions, and no sum overflows or becomes denormal.
    factors = tvm.runtime.tensor(np.zeros((2, instruction.words), np.int32))
    shape = tasks, instruction.chains, instruction.lanes
    sums = tvm.runtime.tensor(np.zeros(shape, instruction.sum_dtype))
    return tasks * _TURNS * instruction.chains * instruction.operations / _best(run, factors, sums)


def _measure_tiles(instruction: TileInstruction) -> float:
    import tvm

    from llmc.targets.cpu.kernels.peak import TILE_CHAINS

    tasks, turns = num_cores(), _TURNS // 16
    run = build_tile_loop(instruction, turns=turns, tasks=tasks)
    factors = tvm.runtime.tensor(np.zeros((2, 16, 16), np.int32))
    sums = tvm.runtime.tensor(np.zeros((tasks, TILE_CHAINS, 16, 16), instruction.sum_dtype))
    return tasks * turns * TILE_CHAINS * instruction.operations / _best(run, factors, sums)


def _best(run: Callable[..., None], *arguments: tvm.runtime.Tensor) -> float:
    """The least seconds of a call."""
    best = float("inf")
    for _ in range(_RUNS):
        start = time.perf_counter()
        run(*arguments)
        best = min(best, time.perf_counter() - start)
    return best


def _triple(machine: str) -> str:
    if platform.system() == "Darwin":
        return {"x86_64": "x86_64-apple-macos13.0", "aarch64": "arm64-apple-macos13.0"}[machine]
    return f"{machine}-unknown-linux-gnu"
