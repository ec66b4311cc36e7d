"""llmc's own side of the comparison."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine import (
    BATCH_PROMPT_TOKENS,
    BATCHES,
    PREFILL_TOKENS,
    START_TOKENS,
    Figures,
    Measured,
    Plan,
)
from benchmarks.models import REPOSITORY, Files, llmc_command
from benchmarks.process import Finished, run
from benchmarks.record import METRICS
from llmc.cli.kernel_cost import Limits

_PROFILE_GEN_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """The package beside this one."""

    version: str
    name: str = "llmc"
    folder: Path = REPOSITORY

    def prefill(self, files: Files, plan: Plan) -> Measured:
        """See Engine."""
        finished = _bench(files, plan, PREFILL_TOKENS, 2, "1", "--repeat", "1")
        [result] = json.loads(finished.stdout)["results"]
        # The command's own figure: what it measures the memory's bandwidth with comes after.
        return finished, {
            "prefill": result["prefill_tokens_per_s"]["median"],
            "memory": result["peak_memory_mib"],
        }

    def decode(self, files: Files, plan: Plan, depth: int) -> Measured:
        """See Engine."""
        # A sequence's first token counts as prefill's.
        finished = _bench(files, plan, max(1, depth), plan.gen_tokens + 1, "1", "--repeat", "1")
        [result] = json.loads(finished.stdout)["results"]
        return finished, _decoding(f"decode-{depth}", result)

    def batches(self, files: Files, plan: Plan) -> Measured:
        """See Engine."""
        sizes = ",".join(map(str, BATCHES))
        finished = _bench(
            files, plan, BATCH_PROMPT_TOKENS, plan.gen_tokens + 1, sizes, "--repeat", "1"
        )
        figures: Figures = {}
        for result in json.loads(finished.stdout)["results"]:
            figures |= _decoding(f"batch-{result['batch']}", result)
        return finished, figures

    def start(self, files: Files, plan: Plan) -> Measured:
        """See Engine."""
        ids = ",".join(map(str, range(1, START_TOKENS + 1)))
        options = ["--ids", ids, "-n", "1", "--temperature", "0"]
        finished = _llmc(plan, "run", str(files.artifact), *options)
        return finished, {"start": finished.seconds}


def profile(files: Files, plan: Plan) -> tuple[list[dict[str, Any]], list[Limits]]:
    """Each kernel of a prefill step and of decode steps, and the machine's limits as measured
    beside; see `llmc bench --profile`.
    """
    steps: list[dict[str, Any]] = []
    limits = []
    for prompt, batches in ((PREFILL_TOKENS, "1"), (BATCH_PROMPT_TOKENS, str(max(BATCHES)))):
        finished = _bench(
            files, plan, prompt, _PROFILE_GEN_TOKENS, batches, "--profile", "--repeat", "2"
        )
        report = json.loads(finished.stdout)
        steps += report["steps"]
        limits.append(Limits(**report["limits"]))
    # The second run's prefill is of no interest.
    return [s for s in steps if s["num_tokens"] in (PREFILL_TOKENS, s["num_sequences"])], limits


def _decoding(metric: str, result: dict[str, Any]) -> Figures:
    return {
        metric: result["decode_tokens_per_s"]["median"],
        METRICS[metric].beside: result["memory_bandwidth_share"]["median"],
    }


def _bench(
    files: Files, plan: Plan, prompt: int, gen: int, batches: str, *options: str
) -> Finished:
    sizes = ["--prompt-tokens", str(prompt), "--gen-tokens", str(gen), "--batch", batches]
    return _llmc(plan, "bench", str(files.artifact), *sizes, "--warm-up", "1", "--json", *options)


def _llmc(plan: Plan, *arguments: str) -> Finished:
    env = {"LLMC_NUM_THREADS": str(plan.threads)}
    return run([*llmc_command(), *arguments], env=env, cwd=REPOSITORY)
