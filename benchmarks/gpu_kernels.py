"""`python -m benchmarks.gpu_kernels`: each kernel of the GPU targets beside dlight's fallback.

Both compute the same operator on the same device in the same run, by turns: the shapes are those of
SmolLM2-135M, one token behind 512, a few and many, with a mixture of experts added. The fallback
gets what it can read, which makes it no slower: static shapes, plain layouts and, in attention,
keys and values without pages.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import click
import numpy as np
import tvm
from tvm.s_tir import dlight

from benchmarks import gpu_routing
from benchmarks.cli import explained
from benchmarks.gpu_cases import Case
from benchmarks.gpu_operators import OPERATORS as SMOLLM2
from llmc.cli.console import console, say, table
from llmc.errors import UsageError
from llmc.targets.base import Array
from llmc.targets.registry import open_target

OPERATORS: dict[str, Callable[[int], Case]] = {
    **SMOLLM2,
    "experts": gpu_routing.experts,
    "top-k": gpu_routing.largest,
    "argmax": gpu_routing.likeliest,
}
_TOLERANCE = 1e-3  # of the largest output: the two add in different orders, nothing else
_LEAST_SECONDS = 5e-3  # of a measurement


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--tokens", default="1,8,35", help="Tokens of the shapes.")
@click.option("--repeat", default=15, type=click.IntRange(min=1), help="Measurements of each.")
@click.option("--only", default="", help="Operators whose names contain this.")
def main(tokens: str, repeat: int, only: str) -> None:
    """Time each kernel and dlight's fallback by turns on the first Vulkan device."""
    target = open_target("vulkan").tvm_target
    cases = [
        operator(count)
        for name, operator in OPERATORS.items()
        if only in name
        for count in _counts(tokens)
    ]
    if not cases:
        raise UsageError(f"no operator is called {only!r}", hint=f"one of {', '.join(OPERATORS)}")
    say(
        f"{tvm.device('vulkan', 0).device_name}, {os.cpu_count()} CPUs, "
        f"TVM {version('apache-tvm')}, load {os.getloadavg()[0]:.1f}; "
        f"two calls of each to warm up, n = {repeat}: median (least … most), ms a call"
    )
    rows = table("operator", ">tokens", ">ours", ">fallback", ">ours of fallback")
    for case in cases:
        ours, theirs = measure(case, target, repeat)
        share = statistics.median(ours) / statistics.median(theirs)
        rows.add_row(case.name, str(case.tokens), _cell(ours), _cell(theirs), f"{share:.2f}")
        say(f"{case.name}, {case.tokens} tokens: {share:.2f}")
    console().print(rows)


def _counts(text: str) -> list[int]:
    """The numbers of tokens; UsageError where they are none."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError as exc:
        raise UsageError(f"--tokens is {text!r}", hint="numbers, comma-separated") from exc
    if min(counts) < 1:
        raise UsageError(f"--tokens is {text!r}", hint="a step has at least one token")
    return counts


def measure(case: Case, target: tvm.target.Target, repeat: int) -> tuple[list[float], list[float]]:
    """Seconds of `repeat` calls of our kernel and of the fallback; raises where they differ."""
    with target:
        scheduled = dlight.gpu.Fallback().apply(case.plain, target, False)
    functions = {"ours": case.kernel, "theirs": scheduled.mod["main"]}
    named = {n: f.with_attr("global_symbol", n) for n, f in functions.items()}
    library = tvm.compile(tvm.IRModule(named), target=target)
    device = tvm.device(target.kind.name, 0)
    sides = [
        _Side(library["ours"], case.inputs, case.outputs, device),
        _Side(library["theirs"], case.plain_inputs, case.plain_outputs, device),
    ]
    for side in sides:
        side.seconds(1)
    _check(case, sides)
    # Of a short kernel several calls, as in a step, so that waiting for the device counts little.
    calls = max(1, int(_LEAST_SECONDS / max(side.seconds(1) for side in sides)))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeat):
        for side, found in zip(sides, times, strict=True):
            found.append(side.seconds(calls))
    return times


class _Side:
    """One kernel with its arguments on the device."""

    def __init__(
        self,
        kernel: Callable[..., None],
        inputs: list[Array],
        outputs: list[Array],
        device: tvm.runtime.Device,
    ) -> None:
        self._kernel = kernel
        self._device = device
        tensors = [tvm.runtime.tensor(array, device) for array in (*inputs, *outputs)]
        self._arguments = tensors
        self.outputs = tensors[len(inputs) :]

    def seconds(self, calls: int) -> float:
        """The mean time of so many calls, until the device has done them."""
        self._device.sync()
        begin = time.perf_counter()
        for _ in range(calls):
            self._kernel(*self._arguments)
        self._device.sync()
        return (time.perf_counter() - begin) / calls


def _check(case: Case, sides: list[_Side]) -> None:
    ours, theirs = (side.outputs[-1].numpy() for side in sides)
    ours = (ours if case.arranged is None else case.arranged(ours)).reshape(theirs.shape)
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert worst < _TOLERANCE, f"{case.name}, {case.tokens} tokens: off by {worst:.1e}"


def _cell(seconds: list[float]) -> str:
    low, high = min(seconds), max(seconds)
    return f"{statistics.median(seconds) * 1e3:.3f} ({low * 1e3:.3f} … {high * 1e3:.3f})"


if __name__ == "__main__":
    explained(main, "python -m benchmarks.gpu_kernels")
