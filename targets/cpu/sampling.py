"""The functions of targets/sampling.py on CPUs: one kernel finds, one draws."""

from __future__ import annotations

from typing import Any

from llmc.targets.cpu.kernels.argmax import argmax
from llmc.targets.cpu.kernels.draw import draw
from llmc.targets.cpu.parameters import SamplingParameters
from llmc.targets.sampling import DrawInputs, SamplingFunctions

Expr = Any


class CpuSampling(SamplingFunctions):
    """All threads share the rows, and for the likeliest token the parts of a row."""

    rule = "cpu.sampling"

    def __init__(self, vocab_size: int, params: SamplingParameters) -> None:
        super().__init__(vocab_size)
        self.params = params

    def largest(self, logits: Expr, rows: Expr) -> Expr:
        """See SamplingFunctions."""
        return self.call(argmax(self.vocab_size, self.params), [logits, rows], [self.integers()])[0]

    def drawn(self, inputs: DrawInputs, *, limited: bool) -> Expr:
        """See SamplingFunctions: a kernel that finds no limits has nothing to search for."""
        kernel = draw(self.vocab_size, self.params)
        return self.call(kernel, inputs.arguments, [self.integers()])[0]
