"""Writing keys and values into pages, with and without rotation, against NumPy."""

import numpy as np
import pytest
from gpu_device import build, empty, normal, run
from gpu_pages import page_shapes, unpack
from paged_reference import rounded

from llmc.targets.gpu.kernels.kv_write import kv_write, rope_kv_write
from llmc.targets.gpu.parameters import GpuParameters

HEADS, KV_HEADS, PAGE_SIZE, GROUP, GROUPS = 3, 2, 16, 1, 2
NUM_PAGES = 5
CASES = {
    # name: head_dim, v_head_dim, rotary_dim, kv_dtype, tokens
    "f32": (64, 64, 64, "float32", None),
    "f16": (24, 40, 24, "float16", None),
    "odd": (10, 7, 6, "float32", None),
    "bf16": (64, 40, 64, "uint16", None),
    "int8": (80, 24, 32, "int8", None),
    "one_token": (64, 64, 64, "float32", 1),
    "one_token_int8": (64, 64, 64, "int8", 1),
}


@pytest.fixture(scope="module")
def kernels():
    functions = {}
    for name, (d, dv, r, kv_dtype, tokens) in CASES.items():
        common = {
            "num_kv_heads": KV_HEADS,
            "head_dim": d,
            "v_head_dim": dv,
            "page_size": PAGE_SIZE,
            "kv_dtype": kv_dtype,
            "group": GROUP,
            "num_groups": GROUPS,
            "tokens": tokens,
            "dtype": "float32",
            "params": GpuParameters(),
        }
        functions[f"write_{name}"] = kv_write(**common)
        functions[f"rope_{name}"] = rope_kv_write(**common, num_heads=HEADS, rotary_dim=r)
    return build(functions)


def slots_of(rows):
    """Shuffled places in pages 1 …; every third token writes nowhere."""
    places = PAGE_SIZE + np.random.default_rng(rows).permutation((NUM_PAGES - 1) * PAGE_SIZE)
    slots = np.full((GROUPS, rows), 10**6, np.int32)
    slots[GROUP] = np.where(np.arange(rows) % 3 == 1, -1, places[:rows])
    return slots


def pages_of(shape):
    dtype = {"uint16": np.uint16, "int8": np.int8}.get(shape.kv.dtype, shape.kv.dtype)
    return np.full((NUM_PAGES, KV_HEADS, shape.elements), 99, dtype)


def check_pages(shape, pages, slots, x, kv_dtype, tolerance):
    """Written slots hold x `[T, Kv, features]`, all others what they held before."""
    stored, before = unpack(shape, pages), unpack(shape, pages_of(shape))
    written = np.zeros((NUM_PAGES, PAGE_SIZE), bool)
    for token, slot in enumerate(slots[GROUP]):
        if slot < 0:
            continue
        page, offset = divmod(int(slot), PAGE_SIZE)
        written[page, offset] = True
        expected = rounded(x[token], kv_dtype)
        found = stored[page, :, offset, : shape.features]
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)
        assert not stored[page, :, offset, shape.features :].any()
    untouched = ~written[:, None, :, None] & np.ones(stored.shape, bool)
    np.testing.assert_array_equal(stored[untouched], before[untouched])


# f16 rounds at 5e-4, bf16 at 4e-3 of a value, an int8 code at 1/127 of the largest: one step where
# the last bit of a float32 decides.
STEP = {"float32": 2e-6, "float16": 1e-3, "uint16": 8e-3, "int8": 4e-2}


@pytest.mark.parametrize("name", CASES)
def test_keys_and_values_land_in_their_slots_and_nowhere_else(kernels, name):
    d, dv, _, kv_dtype, tokens = CASES[name]
    for rows in (tokens,) if tokens else (1, 7, 40):
        key, value, slots = (
            normal(1, rows, KV_HEADS, d),
            normal(1, rows, KV_HEADS, dv),
            slots_of(rows),
        )
        keys, values = page_shapes(kv_dtype, d, dv, PAGE_SIZE)
        arrays = (key, value, slots, pages_of(keys), pages_of(values))
        k_pages, v_pages = run(kernels[f"write_{name}"], *arrays, outputs=[3, 4])
        exact = 0 if kv_dtype != "int8" else 1e-6  # a scale is a product with 1/127, not a quotient
        check_pages(keys, k_pages, slots, key[0], kv_dtype, exact)
        check_pages(values, v_pages, slots, value[0], kv_dtype, exact)


@pytest.mark.parametrize("name", CASES)
def test_fused_projection_is_rotated_and_written(kernels, name):
    d, dv, r, kv_dtype, tokens = CASES[name]
    for rows in (tokens,) if tokens else (1, 7, 40):
        parts = (
            normal(1, rows, HEADS, d),
            normal(1, rows, KV_HEADS, d),
            normal(1, rows, KV_HEADS, dv),
        )
        qkv = np.concatenate([p.reshape(1, rows, -1) for p in parts], axis=2)
        cos, sin = normal(1, rows, r), normal(1, rows, r)[:, ::-1].copy()
        slots = slots_of(rows)
        keys, values = page_shapes(kv_dtype, d, dv, PAGE_SIZE)
        query, k_pages, v_pages = run(
            kernels[f"rope_{name}"],
            *(qkv, cos, sin, slots, pages_of(keys), pages_of(values), empty(1, rows, HEADS, d)),
            outputs=[6, 4, 5],
        )
        np.testing.assert_allclose(query, rotated(parts[0], cos, sin), atol=2e-6, rtol=0)
        turned = rotated(parts[1], cos, sin)[0]
        check_pages(keys, k_pages, slots, turned, kv_dtype, STEP[kv_dtype])
        check_pages(values, v_pages, slots, parts[2][0], kv_dtype, STEP[kv_dtype])


def rotated(x, cos, sin):
    """RoFormer on the first R features of `[1, T, H, D]`, halves paired, float64."""
    r = cos.shape[-1]
    x, cos, sin = (a.astype(np.float64) for a in (x, cos[:, :, None], sin[:, :, None]))
    turned = np.concatenate([-x[..., r // 2 : r], x[..., : r // 2]], axis=-1)
    return np.concatenate([x[..., :r] * cos + turned * sin, x[..., r:]], axis=-1)
