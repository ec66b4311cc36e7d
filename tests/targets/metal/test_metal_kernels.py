"""One kernel of each family, its Metal source run on the CPU, against NumPy in float64."""

from dataclasses import replace

import metal_shim
import numpy as np
import pytest
from gpu_experts import routed_rows
from gpu_pages import matrices, packed, page_shapes, unpack
from matrices import random_matrix
from paged_reference import attention, make_batch

from llmc.formats import FORMATS
from llmc.targets.gpu import layout
from llmc.targets.gpu.kernels.activation import gated_activation
from llmc.targets.gpu.kernels.attention import paged_attention
from llmc.targets.gpu.kernels.embedding import embedding
from llmc.targets.gpu.kernels.grouped_linear import grouped_linear
from llmc.targets.gpu.kernels.grouped_tiles import FloatTile, grouped_tiles
from llmc.targets.gpu.kernels.kv_write import rope_kv_write
from llmc.targets.gpu.kernels.linear import linear_few, linear_many
from llmc.targets.gpu.kernels.matrix_tile import multiply_tile
from llmc.targets.gpu.kernels.norm import add_rms_norm, layer_norm, rms_norm
from llmc.targets.gpu.kernels.top_k import top_k
from llmc.targets.gpu.parameters import AttentionParameters
from llmc.targets.metal.parameters import TILE
from llmc.targets.metal.target import PARAMETERS

pytestmark = pytest.mark.skipif(
    metal_shim.COMPILER is None, reason="needs g++: apt-get install g++"
)
# float32 throughout: a dozen roundings of 6e-8 each, sums of a few hundred terms some more. Metal's
# printer writes constants with seven digits, which is 5e-7.
TOLERANCE = 4e-6
# Weights and activations rounded to float16's 11 bits: 2^-12 of each, as the norm of all.
HALF = 6e-4
M, EXPERTS, TOP = 70, 5, 2  # M: neither a multiple of a panel nor of a tile
F32 = {"dtype": "float32", "vector_dtype": "float32"}
FORMATS_OF_TILES = {"f32": 44, "bf16": 44, "f16": 44, "q4_1": 96, "w8": 50, "q6_k": 256}
HEADS, KV_HEADS, D, PAGE = 6, 2, 64, 16
LENGTHS = ((1, 1), (1, 70), (5, 5), (0, 0), (9, 30))
# A part of a context and a tile are small here, so that a short context has several.
SMALL = replace(
    PARAMETERS, attention=AttentionParameters(decode_parts=3, tile_rows=8, tile_positions=32)
)


@pytest.fixture(scope="module")
def kernels():
    q4 = FORMATS["q4_1"]
    both = {"bias": True, "residual": True}
    functions = {
        "gemv": linear_few(q4, M, 96, 1, params=PARAMETERS.gemv, **both, **F32),
        "few": linear_few(FORMATS["bf16"], M, 50, None, params=PARAMETERS.few, **both, **F32),
        "half": linear_many(
            *(q4, M, 96),
            params=TILE,
            multiply=multiply_tile,
            dtype="float16",
            vector_dtype="float16",
            **both,
        ),
        "few_experts": grouped_linear(
            *(FORMATS["q4_0"], EXPERTS, M, 96, TOP),
            tokens=None,
            per_token_input=True,
            bias=True,
            params=PARAMETERS.gemv,
            **F32,
        ),
        "experts": grouped_tiles(
            *(FORMATS["q4_0"], EXPERTS, M, 96, TOP),
            per_token_input=True,
            bias=True,
            tile=FloatTile(TILE, multiply_tile),
            **F32,
        ),
        "rms": rms_norm(
            features=2100, eps=1e-5, offset=1.0, heads=None, tokens=None, params=PARAMETERS, **F32
        ),
        "add_rms": add_rms_norm(
            features=96, eps=1e-5, offset=0.0, tokens=None, params=PARAMETERS, **F32
        ),
        "layer": layer_norm(features=130, eps=1e-5, tokens=None, params=PARAMETERS, **F32),
        "embedding": embedding(q4, M, 96, tokens=None, dtype="float32", params=PARAMETERS),
        "top_k": top_k(columns=60, k=6, tokens=None, dtype="float32", params=PARAMETERS),
        "silu": gated_activation(
            inner=150, kind="silu", tokens=None, dtype="float32", params=PARAMETERS
        ),
    }
    for name, k in FORMATS_OF_TILES.items():
        functions[f"tile_{name}"] = linear_many(
            *(FORMATS[name], M, k), params=TILE, multiply=multiply_tile, **both, **F32
        )
    for kv_dtype in ("float16", "uint16", "int8"):
        functions[f"rope_{kv_dtype}"] = rope_kernel(kv_dtype)
        functions[f"attention_{kv_dtype}"] = attention_kernel(kv_dtype)
    return metal_shim.build(functions)


def rope_kernel(kv_dtype):
    return rope_kv_write(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=D,
        v_head_dim=D,
        rotary_dim=D,
        page_size=PAGE,
        kv_dtype=kv_dtype,
        group=0,
        num_groups=1,
        tokens=None,
        dtype="float32",
        params=PARAMETERS,
    )


def attention_kernel(kv_dtype):
    return paged_attention(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=D,
        v_head_dim=D,
        page_size=PAGE,
        kv_dtype=kv_dtype,
        scale=D**-0.5,
        window=40,
        softcap=None,
        sinks=True,
        group=0,
        num_groups=1,
        tokens=None,
        dtype="float32",
        sink_dtype="float32",
        params=SMALL,
    )


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def empty(*shape, dtype=np.float32):
    """An output: what a kernel does not write is seen."""
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 99, dtype)


def weights_of(name, k):
    fmt = FORMATS[name]
    matrix, exact = random_matrix(np.random.default_rng(5), fmt, M, k)
    return layout.pack(fmt, [matrix], stacked=False), exact


def close(found, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    ("kernel", "name", "k", "tokens"),
    [("gemv", "q4_1", 96, 1), ("few", "bf16", 50, 1), ("few", "bf16", 50, 7)],
)
def test_products_of_one_and_a_few_tokens(kernels, kernel, name, k, tokens):
    weights, exact = weights_of(name, k)
    x, bias, residual = normal(1, tokens, k), normal(M), normal(1, tokens, M)
    arrays = (x, *weights, bias, residual, empty(1, tokens, M))
    (y,) = metal_shim.run(kernels[kernel], *arrays, outputs=[-1])
    close(y, x.astype(np.float64) @ exact.T + bias + residual)


@pytest.mark.parametrize("name", FORMATS_OF_TILES)
def test_products_on_simdgroup_matrices(kernels, name):
    k = FORMATS_OF_TILES[name]
    weights, exact = weights_of(name, k)
    for tokens in (1, 45):
        x, bias, residual = normal(1, tokens, k), normal(M), normal(1, tokens, M)
        arrays = (x, *weights, bias, residual, empty(1, tokens, M))
        (y,) = metal_shim.run(kernels[f"tile_{name}"], *arrays, outputs=[-1])
        product = x.astype(np.float64) @ exact.T
        found = y - bias - residual
        error = np.linalg.norm(found - product) / np.linalg.norm(product)
        assert error < (TOLERANCE if name in ("f32", "bf16") else HALF)


def test_float16_activations_and_what_is_beyond_their_range(kernels):
    weights, exact = weights_of("q4_1", 96)
    x, bias, residual = (
        a.astype(np.float16) for a in (normal(1, 33, 96), normal(M), normal(1, 33, M))
    )
    arrays = (x, *weights, bias, residual, empty(1, 33, M, dtype=np.float16))
    (y,) = metal_shim.run(kernels["half"], *arrays, outputs=[-1])
    close(y, x.astype(np.float64) @ exact.T + bias + residual, 1e-3)  # y has 11 bits too
    x = np.zeros((1, 9, 96), np.float32)
    x[0, :, 5] = 1e6
    zeros = np.zeros(M, np.float32), np.zeros((1, 9, M), np.float32)
    (y,) = metal_shim.run(kernels["tile_q4_1"], x, *weights, *zeros, empty(1, 9, M), outputs=[-1])
    close(y[0, 3], exact[:, 5] * 65504, HALF)


@pytest.mark.parametrize(("kernel", "tolerance"), [("few_experts", TOLERANCE), ("experts", 2e-3)])
def test_rows_go_through_the_experts_chosen_for_them(kernels, kernel, tolerance):
    sizes = {"num_experts": EXPERTS, "top_k": TOP, "shared_input": True}
    case = routed_rows(FORMATS["q4_0"], M, 96, tokens=13, **sizes)
    arrays = (*case.arrays, empty(13 * TOP, M))
    (y,) = metal_shim.run(kernels[kernel], *arrays, outputs=[-1])
    close(y, case.products + case.biases, tolerance)


def rms(x, weight):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def test_norms(kernels):
    x, weight = 5 * normal(1, 3, 2100), normal(2100)
    (y,) = metal_shim.run(kernels["rms"], x, weight, empty(*x.shape), outputs=[2])
    close(y, rms(x, weight + 1))
    x, residual, weight = normal(1, 3, 96), normal(1, 3, 96)[:, ::-1].copy(), normal(96)
    arrays = (x, residual, weight, empty(*x.shape), empty(*x.shape))
    total, y = metal_shim.run(kernels["add_rms"], *arrays, outputs=[3, 4])
    np.testing.assert_array_equal(total, x + residual)
    close(y, rms(x + residual, weight))
    x, weight, bias = normal(1, 3, 130), normal(130), normal(130, 1)[:, 0]
    (y,) = metal_shim.run(kernels["layer"], x, weight, bias, empty(*x.shape), outputs=[3])
    centred = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
    close(y, centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias)


def test_embedding_gives_rows_of_the_packed_matrix(kernels):
    weights, exact = weights_of("q4_1", 96)
    ids = np.array([[0, 69, 31, 32, 5]], np.int32)
    (y,) = metal_shim.run(kernels["embedding"], ids, *weights, empty(1, 5, 96), outputs=[-1])
    close(y[0], exact[ids[0]])


def test_gated_activation_far_out_too(kernels):
    x = normal(1, 3, 300) * np.float32(4)
    x[0, 0, :4] = 100, -100, 30, -30
    (y,) = metal_shim.run(kernels["silu"], x, empty(1, 3, 150), outputs=[1])
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    close(y, gate / (1 + np.exp(-gate)) * up)


def test_top_k_takes_equal_entries_in_their_order(kernels):
    x = normal(40, 60)
    x[:, 20] = x[:, 10]
    expected = np.argsort(-x, axis=1, kind="stable")[:, :6]
    values, indices = metal_shim.run(
        kernels["top_k"], x, empty(40, 6), empty(40, 6, dtype=np.int32), outputs=[1, 2]
    )
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=1))


# One step of a float16, a bfloat16, or an int8 code, where the last bit of a float32 decides.
STEP = {"float16": 1e-3, "uint16": 8e-3, "int8": 4e-2}


@pytest.mark.parametrize("kv_dtype", STEP)
def test_queries_are_rotated_and_keys_and_values_land_in_their_slots(kernels, kv_dtype):
    rows, pages = 5, 4
    slots = np.array([[3, -1, 40, 17, 63]], np.int32)
    query, key, value = (normal(1, rows, h, D) for h in (HEADS, KV_HEADS, KV_HEADS))
    value = value[:, ::-1].copy()
    qkv = np.concatenate([p.reshape(1, rows, -1) for p in (query, key, value)], axis=2)
    cos, sin = normal(1, rows, D), normal(1, rows, D)[:, ::-1].copy()
    shapes = page_shapes(kv_dtype, D, D, PAGE)
    before = [packed(s, np.ones((pages, KV_HEADS, PAGE, D), np.float32)) for s in shapes]
    arrays = (qkv, cos, sin, slots, *before, empty(1, rows, HEADS, D))
    found, *after = metal_shim.run(kernels[f"rope_{kv_dtype}"], *arrays, outputs=[6, 4, 5])
    close(found, rotated(query, cos, sin))
    stored = (rotated(key, cos, sin), value)
    for shape, page, expected in zip(shapes, after, stored, strict=True):
        held = unpack(shape, page)[..., :D].swapaxes(1, 2).reshape(pages * PAGE, KV_HEADS, D)
        full = np.ones_like(held)
        for row, slot in enumerate(slots[0]):
            if slot >= 0:
                full[slot] = expected[0, row]
        largest = np.abs(full).max(axis=-1, keepdims=True)
        assert (np.abs(held - full) <= STEP[kv_dtype] * largest).all()


def rotated(x, cos, sin):
    """RoFormer on `[1, T, H, D]`, halves paired, float64."""
    x, cos, sin = (a.astype(np.float64) for a in (x, cos[:, :, None], sin[:, :, None]))
    turned = np.concatenate([-x[..., D // 2 :], x[..., : D // 2]], axis=-1)
    return x * cos + turned * sin


@pytest.mark.parametrize("kv_dtype", STEP)
def test_attention_of_a_ragged_batch(kernels, kv_dtype):
    """Decodes in parts and prompts in tiles, a window, sinks, memory poisoned with NaN."""
    rng = np.random.default_rng(7)
    sizes = D, D, PAGE
    batch = make_batch(
        rng,
        list(LENGTHS),
        num_kv_heads=KV_HEADS,
        head_dim=D,
        v_head_dim=D,
        page_size=PAGE,
        kv_dtype=kv_dtype,
        group=0,
        num_groups=1,
        window=40,
    )
    tokens = int(batch.q_starts[-1])
    q = (3 * rng.standard_normal((1, tokens, HEADS, D))).astype(np.float32)
    sinks = rng.standard_normal(HEADS).astype(np.float32)
    both = zip(page_shapes(kv_dtype, *sizes), matrices(batch, kv_dtype, *sizes), strict=True)
    pages = [packed(*b) for b in both]
    arrays = (q, batch.q_starts, batch.kv_lens, batch.block_tables, *pages, sinks)
    out = empty(1, tokens, HEADS, D)
    (out,) = metal_shim.run(kernels[f"attention_{kv_dtype}"], *arrays, out, outputs=[-1])
    expected = attention(q, batch, scale=D**-0.5, window=40, softcap=None, sinks=sinks)
    # As tests/targets/gpu/test_gpu_attention.py: scores of up to 15 enter the weights rounded.
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=0)
