"""The functions of targets/sampling.py on GPUs: a block for each part of a row of logits."""

from __future__ import annotations

from typing import Any

from llmc.targets.gpu.kernels.argmax import argmax_merge, argmax_parts
from llmc.targets.gpu.kernels.draw import draw, draw_parts
from llmc.targets.gpu.kernels.token_limits import (
    BINS,
    NUM_PASSES,
    limits_begin,
    limits_histogram,
    limits_narrow,
)
from llmc.targets.gpu.layout import ceildiv
from llmc.targets.gpu.parameters import GpuParameters
from llmc.targets.sampling import DrawInputs, SamplingFunctions
from llmc.targets.token_search import FLOATS, INTEGERS

Expr = Any


class GpuSampling(SamplingFunctions):
    """Launches of kernels whose arguments stay on the device."""

    rule = "gpu.sampling"

    def __init__(self, vocab_size: int, params: GpuParameters) -> None:
        super().__init__(vocab_size)
        self.parts = ceildiv(vocab_size, params.sampling.part)
        self.params = params

    def largest(self, logits: Expr, rows: Expr) -> Expr:
        """See SamplingFunctions."""
        sums = [self.integers(self.parts), self.integers(self.parts)]
        params = self.params.sampling
        found = self.call(argmax_parts(self.vocab_size, params), [logits, rows], sums)
        return self.call(argmax_merge(self.vocab_size, params), found, [self.integers()])[0]

    def drawn(self, inputs: DrawInputs, *, limited: bool) -> Expr:
        """See SamplingFunctions."""
        state = self._limits(inputs, NUM_PASSES if limited else 0)
        known = [*inputs.arguments, state]
        sums = [self.floats(self.parts), self.floats(self.parts)]
        kernels = self.params.sampling
        parts = draw_parts(self.vocab_size, kernels, self.params.features)
        found = self.call(parts, known, sums)
        return self.call(draw(self.vocab_size, kernels), [*known, *found], [self.integers()])[0]

    def _limits(self, inputs: DrawInputs, num_passes: int) -> Expr:
        """The state of the search when it is done, its integers."""
        state = [self.integers(INTEGERS), self.floats(FLOATS)]
        bins = [self.integers(self.parts, BINS), self.floats(self.parts, BINS)]
        begin, histogram, narrow = (
            make(self.vocab_size, self.params.sampling)
            for make in (limits_begin, limits_histogram, limits_narrow)
        )
        top_k, settings = inputs.top_k, inputs.settings
        integers, floats = self.call(begin, [inputs.token_ids, top_k, settings], state)
        for _ in range(num_passes):
            seen = [inputs.logits, inputs.rows, inputs.token_ids, settings, integers]
            counts, weights = self.call(histogram, seen, bins)
            known = [counts, weights, top_k, settings, integers, floats]
            integers, floats = self.call(narrow, known, state)
        return integers
