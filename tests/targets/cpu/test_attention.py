"""Paged attention against float64, over ragged batches in memory poisoned with NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from attention_cases import BATCHES, MIXED, SHAPES, AttentionCase
from hypothesis import given, settings

from llmc.cpu_features import host_features
from llmc.errors import UnsupportedError
from llmc.targets.cpu.kernels.attention import AttentionTuning, paged_attention

# Weighted means of values of size 1 by float32 sums of at most a few hundred terms: errors stay
# near 1e-6. Scores reach about 10, whose rounding (1e-6) enters the exponent and thereby the
# weights. f16 pages are exact here: the reference reads the same rounded K and V.
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    tuning: AttentionTuning | None = None


NARROW = AttentionTuning(
    accumulators=6,
    strip_rows=3,
    few_rows=4,
    tile_rows=10,
    block_tokens=32,
    work_items=8,
    part_bytes=1,
    serial_bytes=0,
)
CASES = {
    **{name: Case(**shape) for name, shape in SHAPES.items()},
    "window_of_pages": Case(lengths=MIXED, window=48, page_size=32, tuning=NARROW),
    "one_token_in_parts": Case(tokens=1, lengths=((1, 333),), tuning=NARROW, sinks=True),
    "one_token_f16_window": Case(
        tokens=1, lengths=((1, 100),), window=33, kv_dtype="float16", tuning=NARROW
    ),
    "one_token_fewer_pages_than_parts": Case(
        tokens=1, lengths=((1, 20),), sinks=True, softcap=2.0, tuning=NARROW
    ),
    "long_contexts_in_parts": Case(
        lengths=((1, 700), (40, 400), (1, 9), (0, 0), (3, 290)), tuning=NARROW, sinks=True
    ),
    "long_windows_in_parts": Case(lengths=((1, 700), (40, 400)), tuning=NARROW, window=200),
    "bf16_one_token_in_parts": Case(
        tokens=1, lengths=((1, 333),), kv_dtype="uint16", tuning=NARROW, window=100
    ),
    "int8_one_token_in_parts": Case(
        tokens=1, lengths=((1, 333),), kv_dtype="int8", tuning=NARROW, page_size=32
    ),
    "pages_of_24_tokens": Case(num_heads=2, num_kv_heads=2, page_size=24, lengths=((30, 77),)),
    "one_token_of_many_heads": Case(
        tokens=1, num_heads=32, num_kv_heads=4, lengths=((1, 333),), kv_dtype="float16"
    ),
    "one_token_in_strips": Case(
        tokens=1,
        num_heads=14,
        num_kv_heads=2,
        lengths=((1, 333),),
        kv_dtype="float16",
        tuning=AttentionTuning(few_accumulators=6, few_strip_rows=3, part_bytes=1, serial_bytes=0),
    ),
    "one_token_of_twenty_heads": Case(
        tokens=1, num_heads=20, num_kv_heads=1, lengths=((1, 333),), kv_dtype="float16"
    ),
    "eight_tokens": Case(tokens=8, lengths=((1, 60), (1, 20), (6, 6))),
}


# Products of bfloat16 pairs: 16 lanes, and an instruction that few CPUs have.
DOT = AttentionTuning(bf16_dot=True, rounds=True)
DOT_CASES = {
    "f16": Case(lengths=MIXED, kv_dtype="float16", tuning=DOT),
    "f16_window": Case(lengths=MIXED, kv_dtype="float16", tuning=DOT, window=37),
    "f16_sinks": Case(lengths=MIXED, kv_dtype="float16", tuning=DOT, softcap=3.0, sinks=True),
    "f16_odd_tokens": Case(lengths=((9, 9), (2, 2), (11, 27)), kv_dtype="float16", tuning=DOT),
    "bf16": Case(lengths=MIXED, kv_dtype="uint16", tuning=DOT),
    "bf16_window": Case(lengths=MIXED, kv_dtype="uint16", tuning=DOT, window=37),
    "bf16_one_token": Case(tokens=1, lengths=((1, 333),), kv_dtype="uint16", tuning=DOT),
    "int8": Case(lengths=MIXED, kv_dtype="int8", tuning=DOT),
    "int8_one_token": Case(tokens=1, lengths=((1, 333),), kv_dtype="int8", tuning=DOT),
    "bf16_narrow_values": Case(v_head_dim=24, kv_dtype="uint16", tuning=DOT),
}
# Queries and weights are rounded to 8 bits (2e-3 of their size): scores of size 10 are off by some
# 1e-2 at worst, and so are outputs of size 1.
DOT_TOLERANCE = 2e-2
ROUNDED_TOLERANCE = 3e-2  # where float16 keys and values are rounded as well


def compiled(cases, **target):
    module = tvm.IRModule()
    for name, case in cases.items():
        func = paged_attention(**case.arguments(), tuning=case.tuning)
        module[name] = func.with_attr("global_symbol", name)
    return tvm.compile(module, target=tvm.target.Target({"kind": "llvm", **target}))


@pytest.fixture(scope="module")
def kernels():
    return compiled(CASES, mcpu="x86-64-v3")


@pytest.fixture(scope="module")
def dot_kernels():
    if "avx512_bf16" not in host_features():
        pytest.skip("needs a CPU with AVX512-BF16")
    return compiled(DOT_CASES, mcpu="x86-64-v4", mattr=["-prefer-256-bit", "+avx512bf16"])


@pytest.mark.parametrize("name", CASES)
def test_attention_matches_float64(kernels, name):
    check(kernels[name], CASES[name], TOLERANCE)


@pytest.mark.parametrize("name", DOT_CASES)
def test_attention_by_bfloat16_products_is_as_good_as_bfloat16(dot_kernels, name):
    case = DOT_CASES[name]
    tolerance = ROUNDED_TOLERANCE if case.kv_dtype == "float16" else DOT_TOLERANCE
    check(dot_kernels[name], case, tolerance)


@pytest.mark.parametrize(
    "name", ["long_contexts_in_parts", "window_of_pages", "mixed_f16", "bf16", "int8"]
)
@given(lengths=BATCHES)
@settings(max_examples=15, deadline=None)
def test_any_ragged_batch_matches_float64(kernels, name, lengths):
    check(kernels[name], replace(CASES[name], lengths=tuple(lengths)), TOLERANCE)


def check(kernel, case, tolerance):
    q, batch, sinks = case.inputs()
    out = tvm.runtime.tensor(np.full((*q.shape[:3], case.v_head_dim), np.nan, np.float32))
    arrays = [q, batch.q_starts, batch.kv_lens, batch.block_tables, batch.k_pages, batch.v_pages]
    if sinks is not None:
        arrays.append(sinks)
    kernel(*map(tvm.runtime.tensor, arrays), out)
    expected = case.expected(q, batch, sinks)
    np.testing.assert_allclose(out.numpy(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_heads": 7}, "7"),
        ({"page_size": 12}, "12"),
        ({"kv_dtype": "int4"}, "int4"),
        ({"kv_dtype": "uint16", "head_dim": 15}, "15"),
    ],
)
def test_what_cannot_be_compiled_is_named(change, named):
    arguments = {
        "num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "v_head_dim": 16, "page_size": 16,
        "kv_dtype": "float32", "scale": 1.0, "window": None, "softcap": None, "sinks": False,
        "group": 0, "num_groups": 1,
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match=named):
        paged_attention(**(arguments | change))
