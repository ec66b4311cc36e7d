"""Paged attention against float64, over ragged batches in memory poisoned with NaN."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from attention_cases import BATCHES, MIXED, SHAPES, AttentionCase
from gpu_device import build, empty, run
from gpu_pages import matrices, packed, page_shapes
from hypothesis import given, settings

from llmc.errors import UnsupportedError
from llmc.targets.gpu.kernels.attention import paged_attention
from llmc.targets.gpu.parameters import AttentionParameters, Features, GpuParameters

# Weighted means of values of size 1 by float32 sums of a few hundred terms: errors stay near 1e-6.
# Scores reach about 15; their rounding and that of exp2 (3 + 2|x| units in the last place in
# Vulkan) enter the weights. The pages are exact: the reference reads the same rounded K and V.
TOLERANCE = 2e-5

PARAMS = GpuParameters()
SMALL_BLOCKS = GpuParameters(
    features=Features(subgroup=8, subgroup_extern=("subgroupAdd", "subgroupMax")),
    attention=AttentionParameters(
        decode_threads=32, decode_steps=1, decode_heads=2, tile_rows=8, tile_positions=32
    ),
)
PARTS = GpuParameters(attention=AttentionParameters(decode_parts=5))


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    params: GpuParameters = PARAMS


CASES = {
    **{name: Case(**shape) for name, shape in SHAPES.items()},
    "small_blocks": Case(lengths=MIXED, params=SMALL_BLOCKS, sinks=True, window=150),
    "parts": Case(lengths=MIXED, params=PARTS),
    "parts_with_sinks_and_window": Case(lengths=MIXED, params=PARTS, sinks=True, window=130),
    "one_token_in_parts": Case(tokens=1, lengths=((1, 333),), params=PARTS),
    "f16_activations": Case(dtype="float16", kv_dtype="float16"),
}


@pytest.fixture(scope="module")
def kernels():
    return build({name: function(case) for name, case in CASES.items()})


def function(case):
    return paged_attention(
        **case.arguments(), dtype=case.dtype, sink_dtype="float32", params=case.params
    )


@pytest.mark.parametrize("name", CASES)
def test_attention_matches_float64(kernels, name):
    check(kernels[name], CASES[name])


@pytest.mark.parametrize("name", ["mixed", "small_blocks", "int8"])
@given(lengths=BATCHES)
@settings(max_examples=8, deadline=None)
def test_any_ragged_batch_matches_float64(kernels, name, lengths):
    check(kernels[name], replace(CASES[name], lengths=tuple(lengths)))


def check(kernel, case):
    sizes = case.head_dim, case.v_head_dim, case.page_size
    q, batch, sinks = case.inputs()
    both = zip(
        page_shapes(case.kv_dtype, *sizes), matrices(batch, case.kv_dtype, *sizes), strict=True
    )
    arrays = [q, batch.q_starts, batch.kv_lens, batch.block_tables, *(packed(*b) for b in both)]
    if sinks is not None:
        arrays.append(sinks)
    out = empty(*q.shape[:3], case.v_head_dim, dtype=case.dtype)
    (out,) = run(kernel, *arrays, out, outputs=[-1])
    expected = case.expected(q, batch, sinks)
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
