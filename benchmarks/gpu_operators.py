"""The operators of SmolLM2-135M, each as a GPU kernel of ours and as the plain loops that dlight's
fallback schedules, with inputs of the same numbers for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import te, tirx

from llmc.formats import FORMATS, QuantizedMatrix
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
FORMAT = FORMATS["q4_1"]
_F32 = {"dtype": "float32", "vector_dtype": "float32"}
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


def _case(
    name: str,
    tokens: int,
    kernel: tirx.PrimFunc,
    plain: list[_TE],
    inputs: list[Array],
    outputs: list[Array],
    plain_inputs: list[Array] | None = None,
    arranged: Callable[[Array], Array] | None = None,
) -> Case:
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


def _normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def _product(m: int, k: int) -> Callable[[int], Case]:
    def case(tokens: int) -> Case:
        random = np.random.default_rng(m + k)
        codes = random.integers(0, 16, (m, k), dtype=np.uint8)
        scales = random.uniform(0.5, 1, (m, k // 32)).astype(np.float16)
        mins = random.uniform(-8, -4, (m, k // 32)).astype(np.float16)
        matrix = QuantizedMatrix(format=FORMAT, codes=codes, scales=scales, mins=mins)
        packed = layout.pack(FORMAT, [matrix], stacked=False)
        nibbles = codes.reshape(m, k // 8, 8).astype(np.uint32) << (
            4 * np.arange(8, dtype=np.uint32)
        )
        words = np.bitwise_or.reduce(nibbles, axis=2)
        options = {"bias": False, "residual": False, **_F32}
        if tokens <= FEW_TOKENS:
            one = tokens == 1
            params = PARAMS.gemv.within(layout.num_chunks(FORMAT, k)) if one else PARAMS.few
            kernel = linear_few(FORMAT, m, k, 1 if one else None, params=params, **options)  # type: ignore[arg-type]
        else:
            kernel = linear_many(FORMAT, m, k, params=PARAMS.gemm, **options)  # type: ignore[arg-type]
        x = _normal(1, tokens, k)
        return _case(
            f"product with Q4_1 weights, {m} × {k}",
            tokens,
            kernel,
            _plain_product(tokens, m, k),
            [x, *packed],
            [_zeros(1, tokens, m)],
            [x, words, scales, mins],
        )

    return case


def _plain_product(tokens: int, m: int, k: int) -> list[_TE]:
    x = te.placeholder((1, tokens, k), "float32", "x")
    words = te.placeholder((m, k // 8), "uint32", "words")
    scales = te.placeholder((m, k // 32), "float16", "scales")
    mins = te.placeholder((m, k // 32), "float16", "mins")
    j = te.reduce_axis((0, k), "j")

    def weight(row: _TE, at: _TE) -> _TE:
        shift = tirx.Cast("uint32", at % 8 * 4)
        code = (words[row, at // 8] >> shift) & tirx.const(15, "uint32")
        scale, low = (tirx.Cast("float32", a[row, at // 32]) for a in (scales, mins))
        return tirx.Cast("float32", code) * scale + low

    y = te.compute(
        (1, tokens, m), lambda b, t, r: te.sum(x[b, t, j] * weight(r, j), axis=j), name="y"
    )
    return [x, words, scales, mins, y]


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
    x, weight = _placeholders((1, tokens, EMBED), (EMBED,))
    inputs = [_normal(1, tokens, EMBED), _normal(EMBED)]
    plain = [x, weight, _normalized(x, weight, tokens)]
    return _case("RMSNorm", tokens, kernel, plain, inputs, [_zeros(1, tokens, EMBED)])


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
    x, residual, weight = _placeholders(shape, shape, (EMBED,))
    total = te.compute(shape, lambda *at: x[at] + residual[at], name="total")
    plain = [x, residual, weight, total, _normalized(total, weight, tokens)]
    inputs = [_normal(*shape), 2 * _normal(*shape), _normal(EMBED)]
    outputs = [_zeros(*shape), _zeros(*shape)]
    return _case("residual + RMSNorm", tokens, kernel, plain, inputs, outputs)


def _placeholders(*shapes: tuple[int, ...]) -> list[_TE]:
    return [te.placeholder(shape, "float32", f"x{n}") for n, shape in enumerate(shapes)]


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
    [x] = _placeholders((1, tokens, 2 * INNER))
    y = te.compute(
        (1, tokens, INNER),
        lambda b, t, c: x[b, t, c] / (1.0 + tirx.exp(-x[b, t, c])) * x[b, t, c + INNER],
        name="y",
    )
    inputs = [_normal(1, tokens, 2 * INNER)]
    return _case("SiLU · up", tokens, kernel, [x, y], inputs, [_zeros(1, tokens, INNER)])


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
    x, cos, sin = _placeholders(shape, table, table)
    half = HEAD_DIM // 2

    def rotated(b: _TE, t: _TE, h: _TE, c: _TE) -> _TE:
        other = tirx.Select(
            c < half,
            -x[b, t, h, tirx.min(c + half, HEAD_DIM - 1)],
            x[b, t, h, tirx.max(c - half, 0)],
        )
        return x[b, t, h, c] * cos[b, t, c] + other * sin[b, t, c]

    y = te.compute(shape, rotated, name="y")
    inputs = [_normal(*shape), _normal(*table), 2 * _normal(*table)]
    return _case("rotation", tokens, kernel, [x, cos, sin, y], inputs, [_zeros(*shape)])


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
    key, value = _placeholders(shape, shape)
    written = [_as_half(key, "keys"), _as_half(value, "values")]
    pages = -(-tokens // PAGE)
    empty = np.zeros((pages * PAGE, KV_HEADS, HEAD_DIM), np.float16)
    inputs = [_normal(*shape), 2 * _normal(*shape)]

    def by_token(values: Array) -> Array:
        rows = values.reshape(pages, KV_HEADS, PAGE, HEAD_DIM).swapaxes(1, 2)
        return rows.reshape(-1, KV_HEADS, HEAD_DIM)[:tokens]

    return _case(
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
    matrix = _normal(VOCABULARY, EMBED)
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (1, tokens)).astype(np.int32)
    wanted = te.placeholder((1, tokens), "int32", "ids")
    [rows] = _placeholders((VOCABULARY, EMBED))
    y = te.compute((1, tokens, EMBED), lambda b, t, c: rows[wanted[b, t], c], name="y")
    packed = layout.pack(FORMATS["f32"], [matrix], stacked=False)
    return _case(
        "embedding, float32",
        tokens,
        kernel,
        [wanted, rows, y],
        [ids, *packed],
        [_zeros(1, tokens, EMBED)],
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
    query = _normal(1, tokens, HEADS, HEAD_DIM)
    lengths = [np.array([0, tokens], np.int32), np.array([length], np.int32)]
    tables = np.arange(pages, dtype=np.int32).reshape(1, 1, pages)
    paged = _paged(keys, values, pages)
    return _case(
        f"attention over {length} tokens",
        tokens,
        kernel,
        _plain_attention(tokens, length),
        [query, *lengths, tables, *paged],
        [_zeros(1, tokens, HEADS, HEAD_DIM)],
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
