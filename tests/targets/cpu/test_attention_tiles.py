"""Paged attention in matrix registers (AMX) against float64 of the numbers it multiplies.

The object code that is shipped runs: on the processor where that has such registers, and otherwise
with its tile instructions emulated (see emulated_tiles.py).
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import tvm
from attention_cases import BATCHES, MIXED, AttentionCase
from emulated_tiles import Library, needs_vectors
from hypothesis import given, settings
from paged_reference import attention

from llmc import dialect
from llmc.targets.base import Site
from llmc.targets.cpu.kernels.attention import AttentionTuning, paged_attention
from llmc.targets.cpu.kernels.attention_tile import MatrixTuning
from llmc.targets.cpu.target import CpuTarget

pytestmark = needs_vectors

# Several tiles, strips, blocks and parts of a context.
TUNING = AttentionTuning(
    matrix=MatrixTuning(rows=80),
    work_items=8,
    part_bytes=1,
    serial_bytes=0,
)
CASES = {
    "f16": AttentionCase(lengths=MIXED, kv_dtype="float16"),
    "f32": AttentionCase(lengths=MIXED),
    "bf16": AttentionCase(lengths=MIXED, kv_dtype="uint16"),
    "int8": AttentionCase(lengths=MIXED, kv_dtype="int8", softcap=3.0),
    "window": AttentionCase(
        lengths=((1, 300), (200, 200), (90, 400)), kv_dtype="float16", window=37
    ),
    "window_below_page": AttentionCase(
        lengths=MIXED, kv_dtype="float16", window=5, page_size=32, group=1, num_groups=2
    ),
    "softcap_sinks": AttentionCase(lengths=MIXED, kv_dtype="float16", softcap=3.0, sinks=True),
    "wide_heads": AttentionCase(
        lengths=MIXED, kv_dtype="float16", num_heads=7, num_kv_heads=1, head_dim=160, v_head_dim=96
    ),
    "one_head_each": AttentionCase(
        lengths=((150, 150), (20, 300)), kv_dtype="float16", num_heads=3, head_dim=32, v_head_dim=64
    ),
    "many_shared_heads": AttentionCase(
        lengths=((9, 80), (3, 3)), kv_dtype="float16", num_heads=71, num_kv_heads=1
    ),
}  # fmt: skip
# Weights are rounded to 8 bits, 2^-9 of each at most, and values are at most 6; a few queries that
# lie half way between two numbers are rounded to the other one.
# A tile's only token takes queries and keys as they are, which shows where scores are about 10.
TOLERANCE = 2e-2
SINGLE_TOLERANCE = 5e-2


@pytest.fixture(scope="module")
def library():
    return Library({n: paged_attention(**c.arguments(), tuning=TUNING) for n, c in CASES.items()})


def bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def factors(case, x):
    """What becomes of keys and values of a cache: float16 is rounded half up."""
    if case.kv_dtype != "float16":
        return x if case.kv_dtype == "int8" else bfloat16(x.astype(np.float32))
    _, exponent = np.frexp(x)
    unit = np.exp2(exponent - 8.0)
    return np.sign(x) * np.floor(np.abs(x) / unit + 0.5) * unit


def check(library, name, case):
    q, batch, sinks = case.inputs()
    scale = case.scale * (1 / case.softcap if case.softcap else np.log2(np.e))
    queries = bfloat16(q * np.float32(scale)) / scale
    exact = replace(
        batch,
        keys=[factors(case, k) for k in batch.keys],
        values=[factors(case, v) for v in batch.values],
    )
    expected = attention(
        queries, exact, scale=case.scale, window=case.window, softcap=case.softcap, sinks=sinks
    )
    out = np.full((*q.shape[:3], case.v_head_dim), np.nan, np.float32)
    arrays = [q, batch.q_starts, batch.kv_lens, batch.block_tables, batch.k_pages, batch.v_pages]
    got = library.run(name, *arrays, *([] if sinks is None else [sinks]), out)
    error = np.abs(got - expected)
    assert np.isfinite(got).all()
    tokens = max(2, TUNING.matrix.rows // (case.num_heads // case.num_kv_heads))  # of a tile
    ends = zip(batch.q_starts[1:], case.lengths, strict=True)
    singles = [end - 1 for end, (new, _) in ends if new % tokens == 1]
    assert error[:, singles].max(initial=0) <= SINGLE_TOLERANCE
    assert np.delete(error, singles, axis=1).max(initial=0) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_its_rounded_factors(library, name):
    check(library, name, CASES[name])


@pytest.mark.parametrize("name", ["f16", "int8", "window", "window_below_page", "wide_heads"])
@given(lengths=BATCHES)
@settings(max_examples=15, deadline=None)
def test_any_ragged_batch(library, name, lengths):
    check(library, name, replace(CASES[name], lengths=tuple(lengths)))


@pytest.mark.parametrize("cut", [1, 31, 64, 130])
def test_a_prompt_in_chunks_is_nearly_a_whole_prompt(library, cut):
    """Chunks change what is added up first, and which tokens pass alone."""
    case = replace(CASES["f16"], lengths=((200, 200),))
    q, batch, _ = case.inputs()
    pages = (batch.block_tables, batch.k_pages, batch.v_pages)

    def run(start, stop):
        rows = np.ascontiguousarray(q[:, start:stop])
        starts = np.array([0, stop - start], np.int32)
        return library.run(
            "f16", rows, starts, np.array([stop], np.int32), *pages, np.empty_like(rows)
        )

    whole, parts = run(0, 200), np.concatenate([run(0, cut), run(cut, 200)], axis=1)
    np.testing.assert_allclose(parts[:, 1:], whole[:, 1:], atol=TOLERANCE)


def test_scores_that_grow_late_are_weighed_as_others(library):
    """Sums are rescaled where a later block's scores are larger, by however much."""
    case = replace(CASES["f16"], lengths=((150, 150),), num_heads=9)
    q, batch, _ = case.inputs()
    for growth in (0.5, 5.0, 400.0):
        keys = [k * np.linspace(0.01, growth, len(k))[:, None, None] for k in batch.keys]
        keys = [k.astype(np.float16).astype(np.float64) for k in keys]
        pages = np.zeros_like(batch.k_pages).reshape(-1, case.num_kv_heads, case.head_dim, 16)
        for b, page in enumerate(batch.block_tables[0, 0, :10]):
            rows = keys[0][16 * b : 16 * (b + 1)]
            pages[page, :, :, : len(rows)] = rows.transpose(1, 2, 0)
        arrays = (
            batch.q_starts,
            batch.kv_lens,
            batch.block_tables,
            pages.reshape(batch.k_pages.shape),
        )
        got = library.run("f16", q, *arrays, batch.v_pages, np.empty_like(q))
        queries = bfloat16(q * np.float32(case.scale * np.log2(np.e))) / (
            case.scale * np.log2(np.e)
        )
        exact = replace(
            batch,
            keys=[factors(case, k) for k in keys],
            values=[factors(case, v) for v in batch.values],
        )
        expected = attention(queries, exact, scale=case.scale)
        np.testing.assert_allclose(got[:, 1:], expected[:, 1:], atol=TOLERANCE)


def site(**options):
    """A layer of an entry point for up to 512 tokens, of heads that fit matrix registers."""
    chosen = {"head_dim": 64, "max_tokens": 512, "tokens": None, "factors": "bfloat16", **options}
    head_dim, target = chosen["head_dim"], CpuTarget("amx")
    rows = chosen["tokens"] or tvm.tirx.Var("T", "int64")
    pages, s, b = (tvm.tirx.Var(n, "int64") for n in ("P", "S", "B"))
    kinds = {
        "query": ([1, rows, 8, head_dim], "float32"),
        "q_starts": ([s + 1], "int32"),
        "kv_lens": ([s], "int32"),
        "block_tables": ([1, s, b], "int32"),
        "k_pages": ([pages, *target.key_page(2, head_dim, "float16")], "float16"),
        "v_pages": ([pages, *target.value_page(2, head_dim, "float16")], "float16"),
    }
    return Site(
        op=dialect.PagedAttention(
            group=0, scale=0.1, v_head_dim=head_dim, factors=chosen["factors"]
        ),
        types={name: tvm.relax.TensorType(*kind) for name, kind in kinds.items()},
        max_tokens=chosen["max_tokens"],
        tokens=chosen["tokens"],
        num_groups=1,
        page_size=16,
    )


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, True),
        ({"factors": None}, False),
        ({"head_dim": 80}, False),
        ({"max_tokens": 1, "tokens": 1}, False),
        ({"max_tokens": 8}, True),
    ],
)
def test_matrix_registers_are_for_prompts_of_models_whose_products_are_rounded(options, wanted):
    [rule] = [r for name, r in CpuTarget("amx").kernel_rules if name == "cpu.attention"]
    assert ("tdpbf16ps" in rule(site(**options)).func.script()) == wanted
