"""Paged attention against float64, over ragged batches in memory poisoned with NaN."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from gpu_device import build, empty, run
from gpu_pages import matrices, packed, page_shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_reference import attention, make_batch

from llmc.errors import UnsupportedError
from llmc.targets.gpu.kernels.attention import paged_attention
from llmc.targets.gpu.parameters import AttentionParameters, Features, GpuParameters

# Weighted means of values of size 1 by float32 sums of a few hundred terms: errors stay near 1e-6.
# Scores reach about 15; their rounding and that of exp2 (3 + 2|x| units in the last place in
# Vulkan) enter the weights. The pages are exact: the reference reads the same rounded K and V.
TOLERANCE = 2e-5

MIXED = ((1, 1), (1, 40), (1, 300), (0, 0), (5, 5), (70, 70), (33, 170), (2, 19), (0, 0))
SMALL = ((1, 33), (1, 7), (9, 30))
PARAMS = GpuParameters()
SMALL_BLOCKS = GpuParameters(
    features=Features(subgroup=8, subgroup_extern=("subgroupAdd", "subgroupMax")),
    attention=AttentionParameters(
        decode_threads=32, decode_steps=1, decode_heads=2, tile_rows=8, tile_positions=32
    ),
)
PARTS = GpuParameters(attention=AttentionParameters(decode_parts=5))


@dataclass(frozen=True, kw_only=True)
class Case:
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    v_head_dim: int = 64
    page_size: int = 16
    kv_dtype: str = "float32"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    group: int = 0
    num_groups: int = 1
    tokens: int | None = None
    dtype: str = "float32"
    params: GpuParameters = PARAMS
    lengths: tuple[tuple[int, int], ...] = SMALL


CASES = {
    "mixed": Case(lengths=MIXED),
    "mixed_f16": Case(lengths=MIXED, kv_dtype="float16", page_size=32),
    "small_blocks": Case(lengths=MIXED, params=SMALL_BLOCKS, sinks=True, window=150),
    "window_below_page": Case(lengths=MIXED, window=5),
    "softcap": Case(softcap=3.0),
    "sinks_window_f16_second_group": Case(
        sinks=True, window=20, kv_dtype="float16", group=1, num_groups=2
    ),
    "one_head_each": Case(num_heads=4, num_kv_heads=4, head_dim=8, v_head_dim=8),
    "one_shared_head": Case(num_heads=30, num_kv_heads=1, head_dim=16, v_head_dim=24),
    "many_shared_heads": Case(num_heads=64, num_kv_heads=1, head_dim=24, v_head_dim=16),
    "phi_heads": Case(num_heads=4, num_kv_heads=2, head_dim=80, v_head_dim=96),
    "wide_heads": Case(num_heads=7, num_kv_heads=1, head_dim=256, v_head_dim=256),
    "odd_heads": Case(num_heads=2, num_kv_heads=2, head_dim=5, v_head_dim=7),
    "one_token": Case(tokens=1, lengths=((1, 333),)),
    "one_token_of_many_sequences": Case(tokens=1, lengths=((0, 0), (1, 50), (0, 0)), sinks=True),
    "parts": Case(lengths=MIXED, params=PARTS),
    "parts_with_sinks_and_window": Case(lengths=MIXED, params=PARTS, sinks=True, window=130),
    "one_token_in_parts": Case(tokens=1, lengths=((1, 333),), params=PARTS),
    "bf16": Case(lengths=MIXED, kv_dtype="uint16"),
    "int8": Case(lengths=MIXED, kv_dtype="int8"),
    "int8_softcap": Case(
        num_heads=4, num_kv_heads=2, head_dim=80, v_head_dim=24, kv_dtype="int8", softcap=4.0
    ),
    "f16_activations": Case(dtype="float16", kv_dtype="float16"),
}


@pytest.fixture(scope="module")
def kernels():
    return build({name: function(case) for name, case in CASES.items()})


def function(case):
    return paged_attention(
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        v_head_dim=case.v_head_dim,
        page_size=case.page_size,
        kv_dtype=case.kv_dtype,
        scale=case.head_dim**-0.5,
        window=case.window,
        softcap=case.softcap,
        sinks=case.sinks,
        group=case.group,
        num_groups=case.num_groups,
        tokens=case.tokens,
        dtype=case.dtype,
        sink_dtype="float32",
        params=case.params,
    )


@pytest.mark.parametrize("name", CASES)
def test_attention_matches_float64(kernels, name):
    check(kernels[name], CASES[name])


SEQUENCES = st.tuples(st.integers(0, 40), st.integers(0, 200)).map(
    lambda s: (s[0], s[0] + s[1] if s[0] else 0)
)


@pytest.mark.parametrize("name", ["mixed", "small_blocks", "int8"])
@given(lengths=st.lists(SEQUENCES, min_size=1, max_size=6).filter(lambda s: any(n for n, _ in s)))
@settings(max_examples=8, deadline=None)
def test_any_ragged_batch_matches_float64(kernels, name, lengths):
    check(kernels[name], replace(CASES[name], lengths=tuple(lengths)))


def check(kernel, case):
    rng = np.random.default_rng(7)
    sizes = case.head_dim, case.v_head_dim, case.page_size
    batch = make_batch(
        rng,
        list(case.lengths),
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        v_head_dim=case.v_head_dim,
        page_size=case.page_size,
        kv_dtype=case.kv_dtype,
        group=case.group,
        num_groups=case.num_groups,
        window=case.window,
    )
    num_tokens = int(batch.q_starts[-1])
    q = (3 * rng.standard_normal((1, num_tokens, case.num_heads, case.head_dim))).astype(case.dtype)
    sinks = rng.standard_normal(case.num_heads).astype(np.float32) if case.sinks else None
    both = zip(
        page_shapes(case.kv_dtype, *sizes), matrices(batch, case.kv_dtype, *sizes), strict=True
    )
    arrays = [q, batch.q_starts, batch.kv_lens, batch.block_tables, *(packed(*b) for b in both)]
    if sinks is not None:
        arrays.append(sinks)
    out = empty(1, num_tokens, case.num_heads, case.v_head_dim, dtype=case.dtype)
    (out,) = run(kernel, *arrays, out, outputs=[-1])
    expected = attention(
        q, batch, scale=case.head_dim**-0.5, window=case.window, softcap=case.softcap, sinks=sinks
    )
    # A float16 output has 11 bits and a size of up to 4.
    tolerance = TOLERANCE if case.dtype == "float32" else 3e-3
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("change", "named"), [({"num_heads": 7}, "7"), ({"kv_dtype": "int4"}, "int4")]
)
def test_what_cannot_be_compiled_is_named(change, named):
    case = replace(Case(num_heads=8, num_kv_heads=4), **change)
    with pytest.raises(UnsupportedError, match=named):
        function(case)
