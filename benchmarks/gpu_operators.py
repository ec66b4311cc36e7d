"""The operators of SmolLM2-135M, each as a GPU kernel of ours and as the plain loops that dlight's
fallback schedules, with inputs of the same numbers for both.
"""

from __future__ import annotations

from collections.abc import Callable
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
    zeros,
)
from llmc.formats import FORMATS
from llmc.targets.base import Array
from llmc.targets.gpu import layout
from llmc.targets.gpu.kernels.activation import gated_activation
from llmc.targets.gpu.kernels.attention import paged_attention
from llmc.targets.gpu.kernels.embedding import embedding
from llmc.targets.gpu.kernels.kv_pages import key_shape, kv_type, value_shape
from llmc.targets.gpu.kernels.kv_write import kv_write, rope
from llmc.targets.gpu.kernels.linear import linear_few, linear_many
from llmc.targets.gpu.kernels.norm import add_rms_norm, rms_norm
from llmc.targets.gpu.parameters import GpuParameters

EMBED, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 576, 1536, 9, 3, 64, 49152
CONTEXT = 512  # tokens behind those of a decode
PAGE = 16
EPS = 1e-5
FEW_TOKENS = 8
PARAMS = GpuParameters()
_F32 = {"dtype": "float32", "vector_dtype": "float32"}
_TE = Any


def _product(m: int, k: int) -> Callable[[int], Case]:
    def case(tokens: int) -> Case:
        weights = Weights(m, k)
        options = {"bias": False, "residual": False, **_F32}
        if tokens <= FEW_TOKENS:
            one = tokens == 1
            params = PARAMS.gemv.within(layout.num_chunks(FORMAT, k)) if one else PARAMS.few
            kernel = linear_few(FORMAT, m, k, 1 if one else None, params=params, **options)  # type: ignore[arg-type]
        else:
            kernel = linear_many(FORMAT, m, k, params=PARAMS.gemm, **options)  # type: ignore[arg-type]
        x = normal(1, tokens, k)
        return make_case(
            f"product with Q4_1 weights, {m} × {k}",
            tokens,
            kernel,
            _plain_product(tokens, m, k),
            [x, *weights.packed],
            [zeros(1, tokens, m)],
            [x, *weights.plain],
        )

    return case


def _plain_product(tokens: int, m: int, k: int) -> list[_TE]:
    x = te.placeholder((1, tokens, k), "float32", "x")
    arrays, weight = plain_weights((m,), k)
    j = te.reduce_axis((0, k), "j")
    y = te.compute(
        (1, tokens, m), lambda b, t, r: te.sum(x[b, t, j] * weight(j, r), axis=j), name="y"
    )
    return [x, *arrays, y]


def _norm(tokens: int) -> Case:
    kernel = rms_norm(
        features=EMBED,
        eps=EPS,
        offset=0.0,
        heads=None,
        tokens=1 if tokens == 1 else None,
        params=PARAMS,
        **_F32,
    )
    x, weight = placeholders((1, tokens, EMBED), (EMBED,))
    inputs = [normal(1, tokens, EMBED), normal(EMBED)]
    plain = [x, weight, _normalized(x, weight, tokens)]
    return make_case("RMSNorm", tokens, kernel, plain, inputs, [zeros(1, tokens, EMBED)])


def _add_norm(tokens: int) -> Case:
    kernel = add_rms_norm(
        features=EMBED,
        eps=EPS,
        offset=0.0,
        tokens=1 if tokens == 1 else None,
        params=PARAMS,
        **_F32,
    )
    shape = (1, tokens, EMBED)
    x, residual, weight = placeholders(shape, shape, (EMBED,))
    total = te.compute(shape, lambda *at: x[at] + residual[at], name="total")
    plain = [x, residual, weight, total, _normalized(total, weight, tokens)]
    inputs = [normal(*shape), 2 * normal(*shape), normal(EMBED)]
    outputs = [zeros(*shape), zeros(*shape)]
    return make_case("residual + RMSNorm", tokens, kernel, plain, inputs, outputs)


def _normalized(x: _TE, weight: _TE, tokens: int) -> _TE:
    j = te.reduce_axis((0, EMBED), "j")
    squares = te.compute(
        (1, tokens), lambda b, t: te.sum(x[b, t, j] * x[b, t, j], axis=j), name="squares"
    )
    return te.compute(
        (1, tokens, EMBED),
        lambda b, t, c: x[b, t, c] * tirx.rsqrt(squares[b, t] / float(EMBED) + EPS) * weight[c],
        name="y",
    )


def _activation(tokens: int) -> Case:
    fixed = 1 if tokens == 1 else None
    kernel = gated_activation(
        inner=INNER, kind="silu", tokens=fixed, dtype="float32", params=PARAMS
    )
    [x] = placeholders((1, tokens, 2 * INNER))
    y = te.compute(
        (1, tokens, INNER),
        lambda b, t, c: x[b, t, c] / (1.0 + tirx.exp(-x[b, t, c])) * x[b, t, c + INNER],
        name="y",
    )
    inputs = [normal(1, tokens, 2 * INNER)]
    return make_case("SiLU · up", tokens, kernel, [x, y], inputs, [zeros(1, tokens, INNER)])


def _rope(tokens: int) -> Case:
    kernel = rope(
        heads=HEADS + KV_HEADS,
        head_dim=HEAD_DIM,
        rotary_dim=HEAD_DIM,
        tokens=1 if tokens == 1 else None,
        dtype="float32",
        params=PARAMS,
    )
    shape, table = (1, tokens, HEADS + KV_HEADS, HEAD_DIM), (1, tokens, HEAD_DIM)
    x, cos, sin = placeholders(shape, table, table)
    half = HEAD_DIM // 2

    def rotated(b: _TE, t: _TE, h: _TE, c: _TE) -> _TE:
        other = tirx.Select(
            c < half,
            -x[b, t, h, tirx.min(c + half, HEAD_DIM - 1)],
            x[b, t, h, tirx.max(c - half, 0)],
        )
        return x[b, t, h, c] * cos[b, t, c] + other * sin[b, t, c]

    y = te.compute(shape, rotated, name="y")
    inputs = [normal(*shape), normal(*table), 2 * normal(*table)]
    return make_case("rotation", tokens, kernel, [x, cos, sin, y], inputs, [zeros(*shape)])


def _kv_write(tokens: int) -> Case:
    kernel = kv_write(
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        page_size=PAGE,
        kv_dtype="float16",
        group=0,
        num_groups=1,
        tokens=1 if tokens == 1 else None,
        dtype="float32",
        params=PARAMS,
    )
    shape = (1, tokens, KV_HEADS, HEAD_DIM)
    key, value = placeholders(shape, shape)
    written = [_as_half(key, "keys"), _as_half(value, "values")]
    pages = -(-tokens // PAGE)
    empty = np.zeros((pages * PAGE, KV_HEADS, HEAD_DIM), np.float16)
    inputs = [normal(*shape), 2 * normal(*shape)]

    def by_token(values: Array) -> Array:
        rows = values.reshape(pages, KV_HEADS, PAGE, HEAD_DIM).swapaxes(1, 2)
        return rows.reshape(-1, KV_HEADS, HEAD_DIM)[:tokens]

    return make_case(
        "KV write",
        tokens,
        kernel,
        [key, value, *written],
        [*inputs, np.arange(tokens, dtype=np.int32)[None]],
        _paged(empty, empty, pages),
        inputs,
        by_token,
    )


def _as_half(x: _TE, name: str) -> _TE:
    return te.compute(x.shape, lambda *at: tirx.Cast("float16", x[at]), name=name)


def _embedding(tokens: int) -> Case:
    kernel = embedding(
        FORMATS["f32"],
        VOCABULARY,
        EMBED,
        tokens=1 if tokens == 1 else None,
        dtype="float32",
        params=PARAMS,
    )
    matrix = normal(VOCABULARY, EMBED)
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (1, tokens)).astype(np.int32)
    wanted = te.placeholder((1, tokens), "int32", "ids")
    [rows] = placeholders((VOCABULARY, EMBED))
    y = te.compute((1, tokens, EMBED), lambda b, t, c: rows[wanted[b, t], c], name="y")
    packed = layout.pack(FORMATS["f32"], [matrix], stacked=False)
    return make_case(
        "embedding, float32",
        tokens,
        kernel,
        [wanted, rows, y],
        [ids, *packed],
        [zeros(1, tokens, EMBED)],
        [ids, matrix],
    )


def _attention(tokens: int) -> Case:
    length = CONTEXT + tokens if tokens == 1 else tokens
    kernel = paged_attention(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        page_size=PAGE,
        kv_dtype="float16",
        scale=HEAD_DIM**-0.5,
        window=None,
        softcap=None,
        sinks=False,
        group=0,
        num_groups=1,
        tokens=1 if tokens == 1 else None,
        dtype="float32",
        sink_dtype="float32",
        params=PARAMS,
    )
    pages = -(-length // PAGE)
    keys, values = (
        np.random.default_rng(n)
        .standard_normal((pages * PAGE, KV_HEADS, HEAD_DIM))
        .astype(np.float16)
        for n in (1, 2)
    )
    query = normal(1, tokens, HEADS, HEAD_DIM)
    lengths = [np.array([0, tokens], np.int32), np.array([length], np.int32)]
    tables = np.arange(pages, dtype=np.int32).reshape(1, 1, pages)
    paged = _paged(keys, values, pages)
    return make_case(
        f"attention over {length} tokens",
        tokens,
        kernel,
        _plain_attention(tokens, length),
        [query, *lengths, tables, *paged],
        [zeros(1, tokens, HEADS, HEAD_DIM)],
        [query, keys[:length].copy(), values[:length].copy()],
    )


def _paged(keys: Array, values: Array, pages: int) -> list[Array]:
    """Tokens `[pages · N, Kv, D]` in the pages' layouts: keys by vectors of a token, values by
    token.
    """
    kv = kv_type("float16")
    key, value = key_shape(kv, HEAD_DIM, PAGE), value_shape(kv, HEAD_DIM, PAGE)
    by_page = keys.reshape(pages, PAGE, KV_HEADS, -1, key.vector).transpose(0, 2, 3, 1, 4)
    rows = values.reshape(pages, PAGE, KV_HEADS, HEAD_DIM).transpose(0, 2, 1, 3)
    return [
        np.ascontiguousarray(by_page).reshape(pages, KV_HEADS, key.elements),
        np.ascontiguousarray(rows).reshape(pages, KV_HEADS, value.elements),
    ]


def _plain_attention(tokens: int, length: int) -> list[_TE]:
    share = HEADS // KV_HEADS
    q = te.placeholder((1, tokens, HEADS, HEAD_DIM), "float32", "q")
    k, v = (te.placeholder((length, KV_HEADS, HEAD_DIM), "float16", n) for n in "kv")
    d, j, n = (
        te.reduce_axis((0, e), a) for a, e in (("d", HEAD_DIM), ("j", length), ("n", length))
    )
    i = te.reduce_axis((0, length), "i")

    def cast(value: _TE) -> _TE:
        return tirx.Cast("float32", value)

    scores = te.compute(
        (HEADS, tokens, length),
        lambda h, t, p: te.sum(q[0, t, h, d] * cast(k[p, h // share, d]), axis=d),
        name="scores",
    )

    def score(h: _TE, t: _TE, p: _TE) -> _TE:
        masked = tirx.Select(
            p <= t + (length - tokens), scores[h, t, p], tirx.const(-1e9, "float32")
        )
        return masked * float(HEAD_DIM**-0.5)

    rows = (HEADS, tokens)
    top = te.compute(rows, lambda h, t: te.max(score(h, t, j), axis=j), name="top")
    weights = te.compute(
        (HEADS, tokens, length),
        lambda h, t, p: tirx.exp(score(h, t, p) - top[h, t]),
        name="weights",
    )
    total = te.compute(rows, lambda h, t: te.sum(weights[h, t, i], axis=i), name="total")
    sums = te.compute(
        (1, tokens, HEADS, HEAD_DIM),
        lambda b, t, h, c: te.sum(weights[h, t, n] * cast(v[n, h // share, c]), axis=n),
        name="sums",
    )
    y = te.compute(
        (1, tokens, HEADS, HEAD_DIM), lambda b, t, h, c: sums[b, t, h, c] / total[h, t], name="y"
    )
    return [q, k, v, y]


OPERATORS: dict[str, Callable[[int], Case]] = {
    "qkv": _product((HEADS + 2 * KV_HEADS) * HEAD_DIM, EMBED),
    "gate-up": _product(2 * INNER, EMBED),
    "down": _product(EMBED, INNER),
    "norm": _norm,
    "add-norm": _add_norm,
    "activation": _activation,
    "rope": _rope,
    "kv-write": _kv_write,
    "embedding": _embedding,
    "attention": _attention,
}
