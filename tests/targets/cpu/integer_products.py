"""Random arguments of integer products, and what comes out, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matrices import ON_CPU, random_matrix

from llmc.formats import WeightFormat
from llmc.targets.cpu.kernels.integer import activation_block, sum_factor, unit_of
from llmc.targets.cpu.kernels.outputs import Gated, Quantized
from llmc.targets.cpu.layout import pack

AFFINE = [f for f in ON_CPU if not f.is_float]

TOLERANCE = 2e-6
"""Of Σ|x·w|. Sums of codes are exact; what is rounded are the float32 scalings, one a unit, so the
error stays within a few 2^-24. One wrong code of 768 shows as 1e-3.
"""


@dataclass(frozen=True)
class Case:
    """A product of `tokens` rows with a matrix `[m, k]` in a format."""

    fmt: WeightFormat
    m: int
    k: int
    tokens: int
    block: int
    bias: bool = True
    residual: bool = True
    extreme: bool = False  # codes and activations at the ends of their ranges

    def check(self, run: Callable[..., np.ndarray], tolerance: float = TOLERANCE) -> None:
        """`run(*arrays)`, y `[1, T, M]` the last of them, returns y."""
        arrays, expected, magnitude = self.arguments()
        error = np.abs(run(*arrays)[0] - expected)
        assert (error <= tolerance * magnitude).all()

    def arguments(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """The kernel's arguments, the result `[T, M]` and Σ|x·w| of each."""
        fmt, m, k, tokens, block = self.fmt, self.m, self.k, self.tokens, self.block
        rng = np.random.default_rng(tokens)
        matrix, exact = random_matrix(rng, fmt, m, k)
        codes = rng.integers(-127, 128, (1, tokens, k)).astype(np.int8)
        if self.extreme:
            first = fmt.zero_point - fmt.zero_code
            ends = np.array([first, first + (1 << fmt.code_bits) - 1])
            if fmt.codebook is not None:
                ends = np.array(fmt.codebook)[[0, -1]]
            matrix.codes[...] = np.where(rng.random((m, 1)) < 0.5, ends[0], ends[1])
            exact = matrix.dequantize().astype(np.float64)
            codes[...] = np.where(rng.random((1, tokens, 1)) < 0.5, -127, 127)
        scales = rng.uniform(0, 0.02, (1, tokens, k // block)).astype(np.float32)
        unit = unit_of(fmt, block)
        units = codes.reshape(1, tokens, k // unit, unit).astype(np.int32)
        sums = (units.sum(-1) * sum_factor(fmt)).astype(np.int32)
        extra = [rng.standard_normal(m).astype(np.float32)] if self.bias else []
        extra += [rng.standard_normal((1, tokens, m)).astype(np.float32)] if self.residual else []
        y = np.full((1, tokens, m), np.nan, np.float32)
        x = codes[0].reshape(tokens, k // block, block) * scales[0].astype(np.float64)[:, :, None]
        x = x.reshape(tokens, k)
        expected = x @ exact.T + sum(e.reshape(-1, m) for e in extra)
        # Codes are multiplied unsigned, so a zero point's part counts as well.
        low = exact.min() if fmt.has_min else -np.abs(exact).max()
        magnitude = np.abs(x) @ (np.abs(exact) + np.abs(low)).T + 1
        return [codes, scales, sums, *pack(fmt, [matrix]), *extra, y], expected, magnitude


def quantized_gate(fmt: WeightFormat, m: int, kind: str) -> Callable[[Any], Gated]:
    """What `integer_linear` takes as gate, for a next matrix of the same format."""
    sizes = _out_sizes(fmt, m)

    def gate(count: Any) -> Gated:
        return Gated(kind=kind, output=Quantized.arguments(count, m // 2, **sizes))

    return gate


def _out_sizes(fmt: WeightFormat, m: int) -> dict[str, int]:
    block = activation_block(fmt, m // 2, 32)
    assert block is not None
    return {"block": block, "unit": unit_of(fmt, block), "factor": sum_factor(fmt)}


def check_gated(
    case: Case, run_all: Callable[..., list[np.ndarray]], tolerance: float = TOLERANCE
) -> None:
    """`run_all(*arrays)` returns the arrays; the last three are a gated output (silu)."""
    arrays, sums, magnitude = case.arguments()
    sizes, inner = _out_sizes(case.fmt, case.m), case.m // 2
    block, unit = sizes["block"], sizes["unit"]
    shape = (1, case.tokens, inner)
    codes = np.full(shape, -128, np.int8)
    scales = np.full((*shape[:2], inner // block), np.nan, np.float32)
    totals = np.full((*shape[:2], inner // unit), -1, np.int32)
    *_, codes, scales, totals = run_all(*arrays[:-1], codes, scales, totals)

    gate, up = sums[:, :inner], sums[:, inner:]
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    # The slope of silu is 1.1 at most.
    error = tolerance * (
        1.1 * magnitude[:, :inner] * np.abs(up) + np.abs(gate) * magnitude[:, inner:]
    )
    by_block = scales[0].astype(np.float64).repeat(block, 1)
    assert (np.abs(codes[0] * by_block - expected) <= by_block * 0.51 + 2 * error + 1e-30).all()
    assert (np.abs(codes[0]).reshape(-1, block).max(-1, initial=0) == 127).all()
    added = codes[0].astype(np.int32).reshape(-1, unit).sum(-1)
    np.testing.assert_array_equal(totals.ravel(), added * sizes["factor"])
