"""What is run, on each side, for every figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.llama_cpp import LlamaCpp, json_lines
from benchmarks.models import REPOSITORY, Case, Files, llmc_command
from benchmarks.process import Finished, run
from llmc.cli.kernel_cost import Limits

PREFILL_TOKENS = 512
BATCHES = (4, 16)
BATCH_PROMPT_TOKENS = 16
_START_IDS = "1,2,3,4,5,6,7,8"
_PROFILE_GEN_TOKENS = 16

Figures = dict[str, float]  # by metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What holds for every run."""

    threads: int
    gen_tokens: int  # tokens that a sequence generates while decoding is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A run of each side that gives one or two figures."""

    name: str
    ours: Callable[[Files, Plan], tuple[Finished, Figures]]
    peer: Callable[[LlamaCpp, Files, Plan, str], tuple[Finished, Figures]]  # with its -fa


def scenarios(case: Case) -> list[Scenario]:
    """Those that are measured for a case."""
    return [
        Scenario(name="prefill", ours=_our_prefill, peer=_peer_prefill),
        *(_decode(depth) for depth in case.depths),
        Scenario(name="batches", ours=_our_batches, peer=_peer_batches),
        Scenario(name="start", ours=_our_start, peer=_peer_start),
    ]


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


def _bench(
    files: Files, plan: Plan, prompt: int, gen: int, batches: str, *options: str
) -> Finished:
    sizes = ["--prompt-tokens", str(prompt), "--gen-tokens", str(gen), "--batch", batches]
    return _llmc(plan, "bench", str(files.artifact), *sizes, "--warm-up", "1", "--json", *options)


def _llmc(plan: Plan, *arguments: str) -> Finished:
    env = {"LLMC_NUM_THREADS": str(plan.threads)}
    return run([*llmc_command(), *arguments], env=env, cwd=REPOSITORY)


def _our_prefill(files: Files, plan: Plan) -> tuple[Finished, Figures]:
    finished = _bench(files, plan, PREFILL_TOKENS, 2, "1", "--repeat", "1")
    [result] = json.loads(finished.stdout)["results"]
    # The command's own figure: what it measures the memory's bandwidth with comes after.
    return finished, {
        "prefill": result["prefill_tokens_per_s"]["median"],
        "memory": result["peak_memory_mib"],
    }


def _peer_prefill(peer: LlamaCpp, files: Files, plan: Plan, flash: str) -> tuple[Finished, Figures]:
    options = ["-p", str(PREFILL_TOKENS), "-n", "0"]
    finished = peer.bench(files.gguf, threads=plan.threads, flash=flash, options=options)
    [result] = json_lines(finished)
    return finished, {"prefill": result["avg_ts"], "memory": finished.peak_memory_mib}


def _decode(depth: int) -> Scenario:
    metric = f"decode-{depth}"

    def ours(files: Files, plan: Plan) -> tuple[Finished, Figures]:
        # A sequence's first token counts as prefill's.
        finished = _bench(files, plan, max(1, depth), plan.gen_tokens + 1, "1", "--repeat", "1")
        [result] = json.loads(finished.stdout)["results"]
        return finished, {metric: result["decode_tokens_per_s"]["median"]}

    def peer(peer: LlamaCpp, files: Files, plan: Plan, flash: str) -> tuple[Finished, Figures]:
        options = ["-p", "0", "-n", str(plan.gen_tokens), "-d", str(depth)]
        finished = peer.bench(files.gguf, threads=plan.threads, flash=flash, options=options)
        [result] = json_lines(finished)
        return finished, {metric: result["avg_ts"]}

    return Scenario(name=metric, ours=ours, peer=peer)


def _our_batches(files: Files, plan: Plan) -> tuple[Finished, Figures]:
    sizes = ",".join(map(str, BATCHES))
    finished = _bench(files, plan, BATCH_PROMPT_TOKENS, plan.gen_tokens + 1, sizes, "--repeat", "1")
    results = json.loads(finished.stdout)["results"]
    return finished, {f"batch-{r['batch']}": r["decode_tokens_per_s"]["median"] for r in results}


def _peer_batches(peer: LlamaCpp, files: Files, plan: Plan, flash: str) -> tuple[Finished, Figures]:
    finished = peer.batched_bench(
        files.gguf,
        threads=plan.threads,
        flash=flash,
        batches=list(BATCHES),
        prompt=BATCH_PROMPT_TOKENS,
        gen=plan.gen_tokens,
    )
    return finished, {f"batch-{r['pl']}": r["speed_tg"] for r in json_lines(finished)}


def _our_start(files: Files, plan: Plan) -> tuple[Finished, Figures]:
    options = ["--ids", _START_IDS, "-n", "1", "--temperature", "0"]
    finished = _llmc(plan, "run", str(files.artifact), *options)
    return finished, {"start": finished.seconds}


def _peer_start(peer: LlamaCpp, files: Files, plan: Plan, flash: str) -> tuple[Finished, Figures]:
    options = ["-p", str(len(_START_IDS.split(","))), "-n", "0", "--no-warmup"]
    finished = peer.bench(files.gguf, threads=plan.threads, flash=flash, options=options)
    return finished, {"start": finished.seconds}
