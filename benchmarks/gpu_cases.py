"""One operator as a GPU kernel of ours and as plain loops, with inputs of the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import te, tirx

from llmc.formats import FORMATS, QuantizedMatrix
from llmc.targets.base import Array
from llmc.targets.gpu import layout

FORMAT = FORMATS["q4_1"]  # of all weights that are packed
_TE = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operator at one number of tokens."""

    name: str
    tokens: int
    kernel: tirx.PrimFunc
    plain: tirx.PrimFunc
    inputs: list[Array]
    outputs: list[Array]
    plain_inputs: list[Array] = field(default_factory=list)
    plain_outputs: list[Array] = field(default_factory=list)
    arranged: Callable[[Array], Array] | None = None  # ours of the last output as theirs lies


def make_case(
    name: str,
    tokens: int,
    kernel: tirx.PrimFunc,
    plain: list[_TE],
    inputs: list[Array],
    outputs: list[Array],
    plain_inputs: list[Array] | None = None,
    arranged: Callable[[Array], Array] | None = None,
) -> Case:
    """A case whose plain side is a computation, inputs first and its outputs last."""
    return Case(
        name=name,
        tokens=tokens,
        kernel=kernel,
        plain=te.create_prim_func(plain),
        inputs=inputs,
        outputs=outputs,
        plain_inputs=inputs if plain_inputs is None else plain_inputs,
        plain_outputs=_fresh(plain, len(outputs)),
        arranged=arranged,
    )


def _fresh(plain: list[_TE], count: int) -> list[Array]:
    """Arrays for the last `count` tensors of a computation."""
    return [np.zeros([int(e) for e in t.shape], str(t.dtype)) for t in plain[-count:]]


def normal(*shape: int) -> Array:
    """Reproducible numbers of size 1, float32."""
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def zeros(*shape: int) -> Array:
    """Room for an output."""
    return np.zeros(shape, np.float32)


def placeholders(*shapes: tuple[int, ...]) -> list[_TE]:
    """Float32 inputs of a computation."""
    return [te.placeholder(shape, "float32", f"x{n}") for n, shape in enumerate(shapes)]


class Weights:
    """A matrix `[m, k]`, or a stack of them, in FORMAT: packed as ours, and eight codes a word."""

    def __init__(self, m: int, k: int, num_experts: int | None = None) -> None:
        matrices = [_matrix(m, k, seed) for seed in range(num_experts or 1)]
        stacked = num_experts is not None
        self.packed = layout.pack(FORMAT, matrices, stacked=stacked)
        parts = [(_words(q.codes), q.scales, q.mins) for q in matrices]
        self.plain = [np.stack(part) if stacked else part[0] for part in zip(*parts, strict=True)]


def _matrix(m: int, k: int, seed: int) -> QuantizedMatrix:
    random = np.random.default_rng(m + k + seed)
    return QuantizedMatrix(
        format=FORMAT,
        codes=random.integers(0, 16, (m, k), dtype=np.uint8),
        scales=random.uniform(0.5, 1, (m, k // 32)).astype(np.float16),
        mins=random.uniform(-8, -4, (m, k // 32)).astype(np.float16),
    )


def _words(codes: Array) -> Array:
    groups = codes.reshape(codes.shape[0], -1, 8).astype(np.uint32)
    words: Array = np.bitwise_or.reduce(groups << (4 * np.arange(8, dtype=np.uint32)), axis=2)
    return words


def plain_weights(rows: tuple[int, ...], k: int) -> tuple[list[_TE], Callable[..., _TE]]:
    """The arrays of `Weights.plain` with these leading extents, and a weight of them: (k, *row)."""
    words = te.placeholder((*rows, k // 8), "uint32", "words")
    scales = te.placeholder((*rows, k // 32), "float16", "scales")
    mins = te.placeholder((*rows, k // 32), "float16", "mins")

    def weight(at: _TE, *row: _TE) -> _TE:
        shift = tirx.Cast("uint32", at % 8 * 4)
        code = (words[(*row, at // 8)] >> shift) & tirx.const(15, "uint32")
        scale, low = (tirx.Cast("float32", a[(*row, at // 32)]) for a in (scales, mins))
        return tirx.Cast("float32", code) * scale + low

    return [words, scales, mins], weight
