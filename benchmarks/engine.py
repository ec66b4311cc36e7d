"""What every measured program has to answer, llmc and its peers alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.models import Files
from benchmarks.process import Finished

PREFILL_TOKENS = 512
BATCHES = (4, 16)
BATCH_PROMPT_TOKENS = 16
START_TOKENS = 8

Figures = dict[str, float]  # by metric
Measured = tuple[Finished, Figures]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What holds for every run."""

    threads: int
    gen_tokens: int  # tokens that a sequence generates while decoding is measured


class Engine(Protocol):
    """A program in one way to run it. Every method runs one process; LlmcError where it fails."""

    @property
    def name(self) -> str:
        """Shown beside its figures."""

    @property
    def version(self) -> str:
        """What was measured, in words."""

    @property
    def folder(self) -> Path:
        """Where its programs lie; left out of the commands that are shown."""

    def prefill(self, files: Files, plan: Plan) -> Measured:
        """`prefill`: PREFILL_TOKENS in tokens per second; `memory`: that run's peak."""

    def decode(self, files: Files, plan: Plan, depth: int) -> Measured:
        """`decode-DEPTH`: tokens per second of one sequence behind `depth` tokens."""

    def batches(self, files: Files, plan: Plan) -> Measured:
        """`batch-N` for each N of BATCHES: tokens per second of N sequences together, each behind
        a prompt of BATCH_PROMPT_TOKENS.
        """

    def start(self, files: Files, plan: Plan) -> Measured:
        """`start`: seconds from the process's start to the first token after START_TOKENS."""
