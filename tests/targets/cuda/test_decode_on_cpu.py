"""Attention of single new tokens on a CPU, as cuda_shim.py says."""

import ctypes
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from cuda_shim import build, needs_gcc

pytestmark = needs_gcc
PAGE, WARPS, PARTS = 16, 4, 3
LOG2E = 1.44269504
KINDS = {"half": np.float16, "__nv_bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Case:
    kind: str
    head_dim: int
    heads: int  # that share a K/V head
    v_head_dim: int = 64
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    kv_heads: int = 2

    @property
    def tile(self) -> int:
        return min(self.heads, 8)


CASES = {
    "f16": Case(kind="half", head_dim=64, heads=3),
    "bf16": Case(kind="__nv_bfloat16", head_dim=128, v_head_dim=128, heads=4),
    "window": Case(kind="half", head_dim=64, heads=8, window=40),
    "softcap": Case(kind="__nv_bfloat16", head_dim=96, heads=2, softcap=5.0),
    "sinks": Case(kind="half", head_dim=64, heads=16, window=100, sinks=True),
}


def definition(name, case):
    template = (
        f"<llmc::Heads<{case.kind}, {case.head_dim}, {case.v_head_dim}, {case.heads}, "
        f"{case.kv_heads}>, {WARPS}, {str(case.sinks).lower()}, float, float>"
    )
    return f"""
extern "C" void run_{name}(void** p, float scale, int sequences, int blocks, void* memory) {{
  static void** given;
  static float factor;
  static int num_sequences, num_blocks, sequence, tile, part;
  static void* shared;
  given = p, factor = scale, num_sequences = sequences, num_blocks = blocks, shared = memory;
  for (sequence = 0; sequence < sequences; ++sequence) {{
    for (tile = 0; tile < {case.kv_heads * case.heads // case.tile}; ++tile)
      for (part = 0; part < {PARTS}; ++part) shim::run({32 * WARPS}, [] {{
        llmc::attend_one{template}(
            given[0], given[1], given[2], given[3], given[4], given[5], given[6], given[7],
            given[8], factor, {case.softcap * LOG2E:f}f,
            {2 * LOG2E / case.softcap if case.softcap else 0.0:f}f, {case.window}, 0,
            num_sequences, num_blocks, sequence, tile, part, {PARTS}, shared);
      }});
    for (tile = 0; tile < {case.kv_heads * case.heads}; ++tile) shim::run({case.v_head_dim}, [] {{
      llmc::merge_parts{template}(given[1], given[2], given[6], given[7], given[8],
                                  {case.window}, sequence, tile, {PARTS});
    }});
  }}
}}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    code = "".join(definition(name, case) for name, case in CASES.items())
    return build(["attention_decode"], code, tmp_path_factory.mktemp("shim"))


def expected(case, q, keys, values, sinks):
    """`[heads, v_head_dim]` of one token over a context's keys `[L, kv_heads, D]` and values."""
    begin = max(len(keys) - case.window, 0) if case.window else 0
    found = []
    for head, query in enumerate(q.astype(np.float64)):
        kv_head = head // case.heads
        scores = keys[begin:, kv_head] @ query / np.sqrt(case.head_dim)
        if case.softcap:
            scores = case.softcap * np.tanh(scores / case.softcap)
        joined = np.append(scores, sinks[head]) if case.sinks else scores
        weights = np.exp(scores - joined.max()) / np.exp(joined - joined.max()).sum()
        found.append(weights @ values[begin:, kv_head])
    return np.array(found)


@pytest.mark.parametrize("name", CASES)
def test_attention_over_pages_matches_float64(library, name):
    """Contexts of a token, of a page and one more, and of several parts; a prompt is left alone."""
    case, rng = CASES[name], np.random.default_rng(5)
    kv_lens = np.array([1, 17, 5, 300, 150], np.int32)
    lengths = np.array([1, 1, 5, 1, 1])  # of new tokens
    q_starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    heads, blocks = case.kv_heads * case.heads, 20
    tables = rng.permutation(5 * blocks).reshape(5, blocks).astype(np.int32)
    dtype = KINDS[case.kind]
    # What no context has reached are no numbers.
    shape = (5 * blocks, case.kv_heads)
    k_pages = np.full((*shape, case.head_dim // 8, PAGE, 8), np.nan, dtype)
    v_pages = np.full((*shape, PAGE, case.v_head_dim), np.nan, dtype)
    q = 2 * rng.standard_normal((lengths.sum(), heads, case.head_dim)).astype(np.float32)
    sinks = rng.standard_normal(heads).astype(np.float32)
    out = np.full((lengths.sum(), heads, case.v_head_dim), np.nan, np.float32)
    wanted = {}
    for sequence, length in enumerate(kv_lens):
        keys = rng.standard_normal((length, case.kv_heads, case.head_dim)).astype(dtype)
        values = rng.standard_normal((length, case.kv_heads, case.v_head_dim)).astype(dtype)
        for at in range(length):
            page = tables[sequence, at // PAGE]
            k_pages[page, :, :, at % PAGE] = keys[at].reshape(case.kv_heads, -1, 8)
            v_pages[page, :, at % PAGE] = values[at]
        if lengths[sequence] == 1:
            row = q_starts[sequence]
            floats = (keys.astype(np.float64), values.astype(np.float64))
            wanted[row] = expected(case, q[row], *floats, sinks)
    partial = np.full((5, heads, PARTS, case.v_head_dim + 2), np.nan, np.float32)
    memory = np.full(WARPS * case.tile * (case.v_head_dim + 2) + 16, np.nan, np.float32)
    arrays = [q, q_starts, kv_lens, tables, k_pages, v_pages, sinks, out, partial]
    pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
    scale = ctypes.c_float(LOG2E / np.sqrt(case.head_dim))
    if case.softcap:
        scale = ctypes.c_float(1 / np.sqrt(case.head_dim))
    library[f"run_{name}"](pointers, scale, 5, blocks, ctypes.c_void_p(memory.ctypes.data))
    assert np.isnan(memory[-16:]).all()  # behind the end of shared memory
    assert np.isnan(out[q_starts[2] : q_starts[3]]).all()
    for row, values in wanted.items():
        # Queries and weights keep twice the bits of the stored type.
        np.testing.assert_allclose(out[row], values, rtol=0, atol=2e-4, err_msg=f"row {row}")
