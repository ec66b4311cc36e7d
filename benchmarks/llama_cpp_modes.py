"""llama.cpp's side of the comparison, with and without flash attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine import (
    BATCH_PROMPT_TOKENS,
    BATCHES,
    PREFILL_TOKENS,
    START_TOKENS,
    Measured,
    Plan,
)
from benchmarks.llama_cpp import PACKAGE, VERSION, LlamaCpp, json_lines
from benchmarks.models import Files
from benchmarks.process import Finished

FLASH_ATTENTION = ("0", "1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCppMode:
    """Its benchmark programs, reading the GGUF file itself."""

    programs: LlamaCpp
    flash: str  # of FLASH_ATTENTION
    version: str = f"llama.cpp from {PACKAGE} {VERSION}"

    @property
    def name(self) -> str:
        """See Engine."""
        return f"llama.cpp -fa {self.flash}"

    @property
    def folder(self) -> Path:
        """See Engine."""
        return self.programs.folder

    def prefill(self, files: Files, plan: Plan) -> Measured:
        """See Engine."""
        finished = self._bench(files, plan, "-p", str(PREFILL_TOKENS), "-n", "0")
        [result] = json_lines(finished)
        return finished, {"prefill": result["avg_ts"], "memory": finished.peak_memory_mib}

    def decode(self, files: Files, plan: Plan, depth: int) -> Measured:
        """See Engine."""
        sizes = ["-p", "0", "-n", str(plan.gen_tokens), "-d", str(depth)]
        finished = self._bench(files, plan, *sizes)
        [result] = json_lines(finished)
        return finished, {f"decode-{depth}": result["avg_ts"]}

    def batches(self, files: Files, plan: Plan) -> Measured:
        """See Engine."""
        finished = self.programs.batched_bench(
            files.gguf,
            threads=plan.threads,
            flash=self.flash,
            batches=list(BATCHES),
            prompt=BATCH_PROMPT_TOKENS,
            gen=plan.gen_tokens,
        )
        return finished, {f"batch-{r['pl']}": r["speed_tg"] for r in json_lines(finished)}

    def start(self, files: Files, plan: Plan) -> Measured:
        """See Engine."""
        finished = self._bench(files, plan, "-p", str(START_TOKENS), "-n", "0", "--no-warmup")
        return finished, {"start": finished.seconds}

    def _bench(self, files: Files, plan: Plan, *options: str) -> Finished:
        return self.programs.bench(
            files.gguf, threads=plan.threads, flash=self.flash, options=list(options)
        )
