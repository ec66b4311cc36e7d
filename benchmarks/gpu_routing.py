"""The operators of mixtures of experts and of choosing a token, which SmolLM2's layers lack.

Sizes are SmolLM2's with eight experts of its feed-forward's size, two for each token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from benchmarks.gpu_cases import (
    FORMAT,
    Case,
    Weights,
    make_case,
    normal,
    placeholders,
    plain_weights,
)
from benchmarks.gpu_operators import EMBED, FEW_TOKENS, INNER, PARAMS, VOCABULARY
from llmc.targets.base import Array
from llmc.targets.gpu.kernels.argmax import argmax_parts
from llmc.targets.gpu.kernels.grouped_linear import grouped_linear
from llmc.targets.gpu.kernels.grouped_tiles import FloatTile, grouped_tiles
from llmc.targets.gpu.kernels.top_k import top_k

EXPERTS, TOP = 8, 2
SCORES = 64  # of a router with many experts
CHOSEN = 8
_TE = Any


def experts(tokens: int) -> Case:
    """Every token through the first product of two experts."""
    sizes = (FORMAT, EXPERTS, INNER, EMBED, TOP)
    options = {"per_token_input": True, "bias": False, "dtype": "float32"}
    options["vector_dtype"] = "float32"
    if tokens <= FEW_TOKENS:
        fixed = 1 if tokens == 1 else None
        kernel = grouped_linear(*sizes, tokens=fixed, params=PARAMS.gemv, **options)  # type: ignore[arg-type]
    else:
        kernel = grouped_tiles(*sizes, tile=FloatTile(PARAMS.gemm), **options)  # type: ignore[arg-type]
    weights = Weights(INNER, EMBED, EXPERTS)
    ids = np.random.default_rng(tokens).integers(0, EXPERTS, (tokens, TOP)).astype(np.int32)
    x = normal(tokens, EMBED)
    [rows] = placeholders((tokens, EMBED))
    wanted = te.placeholder((tokens, TOP), "int32", "ids")
    arrays, weight = plain_weights((EXPERTS, INNER), EMBED)
    j = te.reduce_axis((0, EMBED), "j")

    def product(choice: _TE, row: _TE) -> _TE:
        token = choice // TOP
        return te.sum(rows[token, j] * weight(j, wanted[token, choice % TOP], row), axis=j)

    y = te.compute((tokens * TOP, INNER), product, name="y")
    return make_case(
        f"{TOP} of {EXPERTS} experts with Q4_1 weights, {INNER} × {EMBED}",
        tokens,
        kernel,
        [rows, wanted, *arrays, y],
        [x, ids, *weights.packed],
        [np.zeros((tokens * TOP, INNER), np.float32)],
        [x, ids, *weights.plain],
    )


def largest(tokens: int) -> Case:
    """The experts with the largest scores of each token."""
    kernel = top_k(
        columns=SCORES,
        k=CHOSEN,
        tokens=1 if tokens == 1 else None,
        dtype="float32",
        params=PARAMS,
    )
    [x] = placeholders((tokens, SCORES))
    i, j, n = (te.reduce_axis((0, SCORES), name) for name in "ijn")

    def before(t: _TE, c: _TE) -> _TE:
        """How many columns come before one: its place in the order."""
        first = tirx.Or(x[t, i] > x[t, c], tirx.And(x[t, i] == x[t, c], i < c))
        return te.sum(tirx.Cast("int32", first), axis=i)

    rank = te.compute((tokens, SCORES), before, name="rank")
    shape = (tokens, CHOSEN)
    zero = tirx.const(0, "float32")
    values = te.compute(
        shape,
        lambda t, k: te.sum(tirx.Select(rank[t, j] == k, x[t, j], zero), axis=j),
        name="values",
    )
    indices = te.compute(
        shape,
        lambda t, k: te.sum(tirx.Select(rank[t, n] == k, n, 0), axis=n),
        name="indices",
    )
    inputs: list[Array] = [normal(tokens, SCORES)]
    outputs: list[Array] = [np.zeros(shape, np.float32), np.zeros(shape, np.int32)]
    return make_case(
        f"top {CHOSEN} of {SCORES}", tokens, kernel, [x, values, indices], inputs, outputs
    )


def likeliest(tokens: int) -> Case:
    """The likeliest token of each part of each row of logits."""
    part = PARAMS.sampling.part
    parts = VOCABULARY // part
    assert parts * part == VOCABULARY
    logits = normal(tokens, VOCABULARY)
    [x] = placeholders((tokens, VOCABULARY))
    i, j = (te.reduce_axis((0, part), name) for name in "ij")
    shape = (tokens, parts)
    best = te.compute(shape, lambda t, p: te.max(x[t, p * part + i], axis=i), name="best")
    ids = te.compute(
        shape,
        lambda t, p: te.min(
            tirx.Select(x[t, p * part + j] == best[t, p], p * part + j, VOCABULARY), axis=j
        ),
        name="ids",
    )
    outputs: list[Array] = [np.zeros(shape, np.int32), np.zeros(shape, np.int32)]
    return make_case(
        f"likeliest of {VOCABULARY} tokens, by parts",
        tokens,
        argmax_parts(VOCABULARY, PARAMS.sampling),
        [x, best, ids],
        [logits, np.arange(tokens, dtype=np.int32)],
        outputs,
        [logits],
    )
