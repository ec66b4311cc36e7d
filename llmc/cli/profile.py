"""`llmc bench --profile`: where the time of a step goes, kernel by kernel, against the floor."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmc.cli.console import console, table
from llmc.cli.kernel_cost import Argument, CostModel, KernelCost, Limits

if TYPE_CHECKING:
    from llmc.artifact import Manifest
    from llmc.runtime.executor import Executor
    from llmc.runtime.step import BeginStep, Draws, Float32, StepInputs, StepOutput

_OWN_CALLS = "vm.builtin."


@dataclass(frozen=True, slots=True, order=True)
class StepKind:
    """Steps that run the same code on the same shapes, but for the context's length."""

    entry_point: str
    num_tokens: int
    num_sequences: int
    is_decode: bool  # one token of each sequence


@dataclass(slots=True)
class _Calls:
    """All calls of one kernel in steps of one kind."""

    nanoseconds: list[int] = field(default_factory=list)
    costs: list[KernelCost] = field(default_factory=list)  # one a step


@dataclass(slots=True)
class _Steps:
    """What was seen of one kind of step."""

    plain_s: list[float] = field(default_factory=list)  # without the instrument
    profiled_s: list[float] = field(default_factory=list)
    kernels: dict[str, _Calls] = field(default_factory=lambda: defaultdict(_Calls))


class Profiler:
    """A StepExecutor around another: times its steps, and inside `instrumented()` their kernels."""

    def __init__(self, executor: Executor, manifest: Manifest) -> None:
        self._executor = executor
        self.chooses = executor.chooses
        self.begin: BeginStep | None = None  # a step's time is its own
        self._entries = [(e.max_tokens, e.name) for e in manifest.entry_points]
        self._rules = {k.name: k.rule for k in manifest.kernels}
        self._num_scratch = {k.name: k.num_scratch for k in manifest.kernels}
        self._costs = CostModel(
            manifest,
            caches=[t.data_ptr() for t in executor.caches],
            weights=[t.data_ptr() for t in executor.weights],
        )
        self._steps: dict[StepKind, _Steps] = defaultdict(_Steps)
        self._instrumented = False
        self._inputs: StepInputs | None = None
        self._kernels: dict[str, _Calls] = {}
        self._seen: set[str] = set()  # kernels of this step whose cost is known
        self._start_ns = 0
        self.empty_call_ns = 0  # how long a call that does nothing seems to take

    def step(self, inputs: StepInputs) -> Float32:
        """Runs the step and notes its time."""
        with self._timed(inputs):
            return self._executor.step(inputs)

    def step_and_choose(self, inputs: StepInputs, draws: Draws) -> StepOutput:
        """Runs the step, the choice of tokens included, and notes its time."""
        with self._timed(inputs):
            return self._executor.step_and_choose(inputs, draws)

    @contextmanager
    def _timed(self, inputs: StepInputs) -> Iterator[None]:
        steps = self._steps[self._kind(inputs)]
        self._inputs, self._kernels, self._seen = inputs, steps.kernels, set()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        (steps.profiled_s if self._instrumented else steps.plain_s).append(seconds)

    @contextmanager
    def instrumented(self) -> Iterator[None]:
        """Within it every call is timed; steps take longer, kernels do not."""
        self._executor.instrument(self._on_call)
        self._instrumented = True
        try:
            yield
        finally:
            self._executor.instrument(None)
            self._instrumented = False

    def forget(self) -> None:
        """Drops all that was seen: the warm-up."""
        self._steps.clear()

    def _kind(self, inputs: StepInputs) -> StepKind:
        num_tokens = len(inputs.input_ids)
        return StepKind(
            entry_point=next(name for most, name in self._entries if num_tokens <= most),
            num_tokens=num_tokens,
            num_sequences=len(inputs.kv_lens),
            is_decode=inputs.max_q_len == 1,
        )

    def _on_call(
        self,
        _function: Any,  # noqa: ANN401
        name: str,
        before: bool,
        _result: Any,  # noqa: ANN401
        *arguments: Any,  # noqa: ANN401
    ) -> int:
        if before:
            self._start_ns = time.perf_counter_ns()
            return 0
        elapsed = time.perf_counter_ns() - self._start_ns
        if name.startswith(_OWN_CALLS):
            self.empty_call_ns = min(self.empty_call_ns or elapsed, elapsed)
            return 0
        calls = self._kernels[name]
        calls.nanoseconds.append(elapsed)
        if name not in self._seen:
            self._seen.add(name)
            assert self._inputs is not None
            tensors = [Argument.of(a) for a in arguments if hasattr(a, "data_ptr")]
            tensors = tensors[: len(tensors) - self._num_scratch.get(name, 0)]
            calls.costs.append(self._costs.cost(tensors, self._inputs))
        return 0

    def report(self, batches: Sequence[int], limits: Limits) -> list[dict[str, Any]]:
        """The most frequent prefill step, then the decode step of each batch size; as JSON."""
        prefills: Counter[StepKind] = Counter(
            {k: len(s.profiled_s) for k, s in self._steps.items() if not k.is_decode}
        )
        kinds = [k for k, _ in prefills.most_common(1)]
        for batch in batches:
            kinds += [
                k
                for k, s in self._steps.items()
                if k.is_decode and k.num_sequences == batch and s.profiled_s
            ]
        return [self._describe(kind, limits) for kind in dict.fromkeys(kinds)]

    def _describe(self, kind: StepKind, limits: Limits) -> dict[str, Any]:
        steps = self._steps[kind]
        num_steps = len(steps.profiled_s)
        kernels = [
            self._describe_kernel(name, calls, num_steps, limits)
            for name, calls in steps.kernels.items()
        ]
        kernels.sort(key=lambda k: -k["ms_per_step"])
        return {
            "entry_point": kind.entry_point,
            "num_tokens": kind.num_tokens,
            "num_sequences": kind.num_sequences,
            "num_steps": num_steps,
            "step_ms": 1000 * statistics.median(steps.plain_s or steps.profiled_s),
            "kernels_ms": sum(k["ms_per_step"] for k in kernels),
            "floor_ms": sum(k["floor_us"] * k["calls_per_step"] for k in kernels) / 1000,
            "kernels": kernels,
        }

    def _describe_kernel(
        self, name: str, calls: _Calls, num_steps: int, limits: Limits
    ) -> dict[str, Any]:
        us = statistics.median(calls.nanoseconds) / 1000
        per_step = len(calls.nanoseconds) / num_steps
        floor_us = 1e6 * statistics.mean(limits.floor_s(c) for c in calls.costs)
        return {
            "name": name,
            "rule": self._rules.get(name, ""),
            "calls_per_step": per_step,
            "us_per_call": us,
            "ms_per_step": us * per_step / 1000,
            "memory_bytes": statistics.mean(c.memory_bytes for c in calls.costs),
            "activation_bytes": statistics.mean(c.activation_bytes for c in calls.costs),
            "operations": statistics.mean(c.operations for c in calls.costs),
            "precision": calls.costs[0].precision,
            "floor_us": floor_us,
            "floor_share": floor_us / us if us else 0.0,
        }


def device_limits(device: Any) -> Limits:  # noqa: ANN401 - a device of tvm_ffi's
    """Of a device with memory of its own, its memory alone: nothing else bounds the floors."""
    from llmc.cli.bandwidth import copy_bandwidth

    rate = copy_bandwidth(device)
    return Limits(memory_bytes_per_s=rate, cache_bytes_per_s=rate, operations_per_s={})


def measure_limits() -> Limits:
    """Measures this machine's memory, caches and arithmetic; some seconds."""
    from llmc.cli.bandwidth import cache_bandwidth, read_bandwidth
    from llmc.cli.peaks import peak_operations

    return Limits(
        memory_bytes_per_s=read_bandwidth(),
        cache_bytes_per_s=cache_bandwidth(),
        operations_per_s=peak_operations(),
    )


def print_steps(steps: Sequence[dict[str, Any]]) -> None:
    """One table for each kind of step, its kernels by time."""
    for step in steps:
        rows = table(
            "kernel",
            "rule",
            ">calls",
            ">µs a call",
            ">of step",
            ">memory, KiB",
            ">activations, KiB",
            ">Mop",
            "factors",
            ">floor, µs",
            ">of floor",
            title=_title(step),
        )
        for kernel in step["kernels"]:
            rows.add_row(*_cells(kernel, step["step_ms"]))
        console().print(rows)


def _title(step: dict[str, Any]) -> str:
    return (
        f"{step['entry_point']}, {step['num_tokens']} tokens of {step['num_sequences']} sequences, "
        f"n = {step['num_steps']}: {step['step_ms']:.3f} ms a step, "
        f"kernels {step['kernels_ms']:.3f} ms, their floor {step['floor_ms']:.3f} ms"
    )


def _cells(kernel: dict[str, Any], step_ms: float) -> list[str]:
    return [
        kernel["name"],
        kernel["rule"],
        f"{kernel['calls_per_step']:.0f}",
        f"{kernel['us_per_call']:.1f}",
        f"{kernel['ms_per_step'] / step_ms:.1%}",
        f"{kernel['memory_bytes'] / 1024:.1f}",
        f"{kernel['activation_bytes'] / 1024:.1f}",
        f"{kernel['operations'] / 1e6:.2f}" if kernel["operations"] else "",
        kernel["precision"] if kernel["operations"] else "",
        f"{kernel['floor_us']:.1f}",
        f"{kernel['floor_share']:.0%}",
    ]
