"""Measures prefill and decode of an engine, one batch size at a time."""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.errors import LlmcError, UsageError

if TYPE_CHECKING:
    from llmc.artifact import MemoryPlan
    from llmc.runtime.engine import Engine

_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run of one batch."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    ttft_ms: float  # median over the sequences
    inter_token_ms: float  # median over all sequences' steps
    decode_steps_per_s: float
    mean_context_tokens: float  # of one sequence during decode


@dataclass(slots=True)
class _Clock:
    """When each sequence's tokens arrived, in seconds since the batch was submitted."""

    arrivals: dict[str, list[float]] = field(default_factory=dict)
    step_ends: list[float] = field(default_factory=list)


def measure(engine: Engine, *, batch: int, prompt_tokens: int, gen_tokens: int) -> Measurement:
    """Submits `batch` random prompts at once and runs them to their end, greedily.

    Prefill lasts until every sequence has its first token. Decode is what follows, until the first
    sequence ends: only then the batch is as large as it says. What the first sequences generate
    during prefill, and the last ones after decode, counts for neither.
    """
    clock = _run_batch(engine, batch=batch, prompt_tokens=prompt_tokens, gen_tokens=gen_tokens)
    arrivals = list(clock.arrivals.values())
    first = [times[0] for times in arrivals]
    prefill_end, decode_end = max(first), min(times[-1] for times in arrivals)
    if decode_end <= prefill_end:
        raise UsageError(
            f"--gen-tokens {gen_tokens}: at batch {batch} the first sequence ends before the last "
            "one begins",
            hint="raise --gen-tokens or lower --prompt-tokens",
        )
    gaps = [
        later - earlier
        for times in arrivals
        for earlier, later in itertools.pairwise(times)
        if earlier >= prefill_end and later <= decode_end
    ]
    decoded = sum(prefill_end < t <= decode_end for times in arrivals for t in times)
    steps = [end for end in clock.step_ends if prefill_end < end <= decode_end]
    seconds = decode_end - prefill_end
    return Measurement(
        prefill_tokens_per_s=batch * prompt_tokens / prefill_end,
        decode_tokens_per_s=decoded / seconds,
        ttft_ms=1000 * statistics.median(first),
        inter_token_ms=1000 * statistics.median(gaps),
        decode_steps_per_s=len(steps) / seconds,
        mean_context_tokens=prompt_tokens + gen_tokens / 2,
    )


def _run_batch(engine: Engine, *, batch: int, prompt_tokens: int, gen_tokens: int) -> _Clock:
    from llmc.runtime.sampling_params import SamplingParams

    generator = random.Random(_SEED)  # NumPy's would count in the memory that is measured
    params = SamplingParams(max_tokens=gen_tokens, temperature=0.0, ignore_eos=True)
    clock = _Clock()
    start = time.perf_counter()
    for index in range(batch):
        prompt = generator.choices(range(engine.manifest.model.vocab_size), k=prompt_tokens)
        engine.submit(f"bench-{index}", prompt, params)
    while engine.has_work():
        deltas = engine.step()
        now = time.perf_counter() - start
        clock.step_ends.append(now)
        for delta in deltas:
            if delta.finish_reason == "error":
                raise LlmcError(
                    f"a step failed at batch {batch}", hint="run `llmc verify` on the artifact"
                )
            clock.arrivals.setdefault(delta.request_id, []).extend([now] * len(delta.token_ids))
    return clock


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and number of measurements."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def bandwidth_share(
    measurement: Measurement, memory: MemoryPlan, *, batch: int, bytes_per_s: float
) -> float:
    """(weight bytes + KV bytes read a step) · decode steps per second / read bandwidth."""
    kv_bytes = batch * measurement.mean_context_tokens * memory.kv_bytes_per_token
    return (memory.weights_bytes + kv_bytes) * measurement.decode_steps_per_s / bytes_per_s


def peak_memory_mib() -> float:
    """The process's largest resident size so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux counts what a parent held when it started this program into getrusage's figure.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024
