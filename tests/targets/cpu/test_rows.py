"""Norms, activations, rotary embedding and K/V writes against NumPy in float64."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import tvm
from paged_reference import packed, rounded, unpacked

from llmc.errors import UnsupportedError
from llmc.targets.cpu.kernels.activation import ACTIVATIONS, gated_activation
from llmc.targets.cpu.kernels.kv_write import kv_write
from llmc.targets.cpu.kernels.norm import add_rms_norm, layer_norm, narrow_rms_norm, rms_norm
from llmc.targets.cpu.kernels.outputs import Quantized, Rounded
from llmc.targets.cpu.kernels.rope import rope, rope_kv_write

EPS = 1e-5
# One float32 rounding of a value of size 1 is 6e-8; each kernel makes a dozen, sums of a row a few
# more.
TOLERANCE = 2e-6
# Threads wake at 65,536 floats: 1,000 rows are past that for most kernels here, 3 rows never.
ROWS = (1, 3, 1000)
HEADS, KV_HEADS, PAGE_SIZE = 3, 2, 16
ROPES = {
    # name: head_dim, v_head_dim, rotary_dim, interleaved, kv_dtype, tokens
    "half_split": (64, 64, 64, False, "float32", None),
    "half_split_f16": (24, 40, 24, False, "float16", None),
    "partial": (80, 64, 32, False, "float32", None),
    "interleaved": (64, 64, 64, True, "float32", None),
    "interleaved_partial_f16": (24, 8, 10, True, "float16", None),
    "one_token": (64, 64, 64, False, "float32", 1),
    "half_split_bf16": (64, 40, 64, False, "uint16", None),
    "partial_int8": (80, 24, 32, False, "int8", None),
    "one_token_int8": (64, 64, 64, False, "int8", 1),
}


@pytest.fixture(scope="module")
def kernels():
    functions = {
        "rms_norm": rms_norm(features=576, eps=EPS),
        "rms_norm_offset_odd": rms_norm(features=40, eps=EPS, weight_offset=1.0),
        "rms_norm_heads": rms_norm(features=64, eps=EPS, heads=HEADS),
        "rms_norm_one": rms_norm(features=576, eps=EPS, tokens=1),
        "quantized_rms_norm": narrow_rms_norm(
            features=576,
            eps=EPS,
            weight_offset=1.0,
            output=lambda t: Quantized.arguments(t, 576, block=64, unit=32, factor=-8),
        ),
        "rounded_rms_norm": narrow_rms_norm(
            features=48,
            eps=EPS,
            weight_offset=0.0,
            output=lambda t: Rounded.arguments(t, 48),
            tokens=1,
        ),
        "add_rms_norm": add_rms_norm(features=576, eps=EPS),
        "layer_norm": layer_norm(features=576, eps=EPS),
        "layer_norm_unbiased": layer_norm(features=24, eps=EPS, bias=False),
    }
    for kind in ACTIVATIONS:
        functions[f"gate_{kind}"] = gated_activation(inner=96, kind=kind)
    functions["up_first"] = gated_activation(inner=24, kind="silu", gate_first=False)
    for name, (d, dv, r, interleaved, dtype, tokens) in ROPES.items():
        functions[f"rope_{name}"] = rope(
            heads=HEADS, head_dim=d, rotary_dim=r, interleaved=interleaved, tokens=tokens
        )
        pages = {
            "num_kv_heads": KV_HEADS,
            "head_dim": d,
            "v_head_dim": dv,
            "page_size": PAGE_SIZE,
            "kv_dtype": dtype,
            "group": 1,
            "num_groups": 2,
            "tokens": tokens,
        }
        functions[f"write_{name}"] = kv_write(**pages)
        functions[f"rope_write_{name}"] = rope_kv_write(
            **pages, num_heads=HEADS, rotary_dim=r, interleaved=interleaved
        )
    module = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()})
    return tvm.compile(module, target=tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"}))


def run(kernel, *arrays, outputs):
    """Calls the kernel with `arrays`, of which those at the indices `outputs` come back."""
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    kernel(*tensors)
    return [tensors[i].numpy() for i in outputs]


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def empty(*shape):
    return np.full(shape, np.nan, np.float32)


def rms(x, weight, eps=EPS):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("name", "lead", "features", "offset"),
    [
        ("rms_norm", (), 576, 0.0),
        ("rms_norm_offset_odd", (), 40, 1.0),
        ("rms_norm_heads", (HEADS,), 64, 0.0),
    ],
)
def test_rms_norm_matches_numpy(kernels, name, lead, features, offset, rows):
    x, weight = 5 * normal(1, rows, *lead, features), normal(features)
    (y,) = run(kernels[name], x, weight, empty(*x.shape), outputs=[2])
    np.testing.assert_allclose(y, rms(x, weight + offset), atol=TOLERANCE, rtol=TOLERANCE)


def test_rms_norm_of_one_fixed_token_and_of_zeros(kernels):
    x, weight = normal(1, 1, 576), normal(576)
    (y,) = run(kernels["rms_norm_one"], x, weight, empty(*x.shape), outputs=[2])
    np.testing.assert_allclose(y, rms(x, weight), atol=TOLERANCE, rtol=TOLERANCE)
    (y,) = run(kernels["rms_norm_one"], 0 * x, weight, empty(*x.shape), outputs=[2])
    assert not y.any()


@pytest.mark.parametrize("rows", ROWS)
def test_norms_are_quantized(kernels, rows):
    x, weight = 5 * normal(1, rows, 576), normal(576)
    outputs = [
        np.zeros((1, rows, 576), np.int8),
        empty(1, rows, 9),
        np.full((1, rows, 18), -1, np.int32),
    ]
    codes, scales, sums = run(kernels["quantized_rms_norm"], x, weight, *outputs, outputs=[2, 3, 4])
    expected = rms(x, weight + 1)
    peak = np.abs(expected).reshape(1, rows, 9, 64).max(-1)
    np.testing.assert_allclose(scales, peak / 127, rtol=TOLERANCE)
    by_block = scales.repeat(64, 2).astype(np.float64)
    assert (np.abs(codes * by_block - expected) <= 0.501 * by_block).all()
    added = codes.reshape(1, rows, 18, 32).astype(np.int32).sum(-1)
    np.testing.assert_array_equal(sums, -8 * added)


def test_norms_are_rounded(kernels):
    x, weight = normal(1, 1, 48), normal(48)
    out = np.zeros(x.shape, np.uint16)
    (y,) = run(kernels["rounded_rms_norm"], x, weight, out, outputs=[2])
    got = y.view(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_allclose(got, rms(x, weight), rtol=2**-8)


@pytest.mark.parametrize("rows", ROWS)
def test_add_rms_norm_gives_the_sum_and_its_norm(kernels, rows):
    x, residual, weight = normal(1, rows, 576), 3 * normal(1, rows, 576)[:, ::-1], normal(576)
    total, y = run(
        kernels["add_rms_norm"],
        x,
        residual.copy(),
        weight,
        empty(*x.shape),
        empty(*x.shape),
        outputs=[3, 4],
    )
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_allclose(y, rms(x + residual, weight), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("rows", ROWS)
def test_layer_norm_keeps_precision_far_from_zero(kernels, rows):
    # A mean 100 times the deviation: a difference of squares would lose four digits.
    for name, features in (("layer_norm", 576), ("layer_norm_unbiased", 24)):
        x, weight, bias = (
            normal(1, rows, features) + 100,
            normal(features),
            normal(features, 1)[:, 0],
        )
        inputs = (x, weight, bias) if name == "layer_norm" else (x, weight)
        (y,) = run(kernels[name], *inputs, empty(*x.shape), outputs=[-1])
        centred = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
        expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * weight
        # The mean is rounded at size 100, a few times 8e-6, and multiplied by weights up to 4.
        np.testing.assert_allclose(
            y, expected + (bias if name == "layer_norm" else 0), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gated_activation_matches_numpy(kernels, kind, rows):
    torch = pytest.importorskip("torch")
    reference = {
        "silu": torch.nn.functional.silu,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }[kind]
    x = 4 * normal(1, rows, 192)
    (y,) = run(kernels[f"gate_{kind}"], x, empty(1, rows, 96), outputs=[1])
    expected = reference(torch.from_numpy(x[..., :96].astype(np.float64))).numpy() * x[..., 96:]
    # gelu subtracts from 1 in its left tail: an absolute error of 4 · 2e-7, times up.
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-6)


def test_gate_may_follow_up(kernels):
    x = normal(1, 3, 48)
    (y,) = run(kernels["up_first"], x, empty(1, 3, 24), outputs=[1])
    up, gate = x[..., :24].astype(np.float64), x[..., 24:].astype(np.float64)
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_unknown_activation_is_named():
    with pytest.raises(UnsupportedError, match="swiglu_oai"):
        gated_activation(inner=16, kind="swiglu_oai")


def rotated(x, cos, sin, interleaved):
    """The formula of transformers, in float64; x `[1, T, H, D]`."""
    x, size = x.astype(np.float64), cos.shape[-1]
    part = x[..., :size]
    if interleaved:
        turned = np.stack([-part[..., 1::2], part[..., ::2]], axis=-1).reshape(part.shape)
    else:
        turned = np.concatenate([-part[..., size // 2 :], part[..., : size // 2]], axis=-1)
    turned = part * cos[:, :, None] + turned * sin[:, :, None]
    return np.concatenate([turned, x[..., size:]], axis=-1)


def angles(rows, size):
    return np.cos(normal(1, rows, size)), np.sin(normal(1, rows, size))


@pytest.mark.parametrize(("name", "rows"), [*itertools.product(ROPES, ROWS)])
def test_rope_matches_numpy(kernels, name, rows):
    d, _, r, interleaved, _, tokens = ROPES[name]
    rows = tokens or rows
    x, (cos, sin) = normal(1, rows, HEADS, d), angles(rows, r)
    (y,) = run(kernels[f"rope_{name}"], x, cos, sin, empty(*x.shape), outputs=[3])
    np.testing.assert_allclose(y, rotated(x, cos, sin, interleaved), atol=TOLERANCE, rtol=0)


def pages_and_slots(rows, d, dv, dtype):
    """Pages full of a mark, and distinct slots of which every fifth writes nowhere."""
    num_pages = -(-rows // PAGE_SIZE) + 2
    k_pages = np.full((num_pages, KV_HEADS, d, PAGE_SIZE), 7, np.float32)
    v_pages = np.full((num_pages, KV_HEADS, PAGE_SIZE, dv), 7, np.float32)
    slots = np.full((2, rows), 10**6, np.int32)  # the other group's: far out of range
    slots[1] = np.random.default_rng(rows).permutation(num_pages * PAGE_SIZE)[:rows]
    slots[1, 1::5] = -1
    return packed(k_pages, dtype, token_axis=3), packed(v_pages, dtype, token_axis=2), slots


def check_pages(pages, dtype, slots, values, *, transposed):
    """Written slots hold `values` `[1, T, Kv, D]` as the type rounds them, the others the mark."""
    features = values.shape[-1]
    shape = (features, PAGE_SIZE) if transposed else (PAGE_SIZE, features)
    found = unpacked(pages, dtype, shape, token_axis=3 if transposed else 2)
    found = found.swapaxes(2, 3) if transposed else found  # [P, Kv, N, features]
    found = found.swapaxes(1, 2).reshape(-1, KV_HEADS, features)
    expected = np.full_like(found, 7)
    written = slots[1] >= 0
    expected[slots[1][written]] = rounded(values[0][written], dtype)
    # Rotated values differ by a rounding or two in float32, which can move a number that lies
    # between two of a type's to the other one: an int8's distance is its token's scale.
    step = {"float32": 0, "float16": 2**-10, "uint16": 2**-7, "int8": 1 / 127}[dtype]
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    size = largest if dtype == "int8" else np.abs(expected)
    assert (np.abs(found - expected) <= TOLERANCE + 1.001 * step * size).all()
    # That is rare: a type that rounded the wrong way would show here.
    moved = np.abs(found - expected) > 4 * TOLERANCE
    assert moved[slots[1][written]].mean() < 0.01
    np.testing.assert_allclose(np.delete(found, slots[1][written], axis=0), 7, rtol=1e-6)


@pytest.mark.parametrize(("name", "rows"), [*itertools.product(ROPES, ROWS)])
def test_kv_write_touches_its_slots_only(kernels, name, rows):
    d, dv, _, _, dtype, tokens = ROPES[name]
    rows = tokens or rows
    k, v = normal(1, rows, KV_HEADS, d), normal(1, rows, KV_HEADS, dv)
    k_pages, v_pages, slots = pages_and_slots(rows, d, dv, dtype)
    new_k, new_v = run(kernels[f"write_{name}"], k, v, slots, k_pages, v_pages, outputs=[3, 4])
    check_pages(new_k, dtype, slots, k, transposed=True)
    check_pages(new_v, dtype, slots, v, transposed=False)


@pytest.mark.parametrize(("name", "rows"), [*itertools.product(ROPES, ROWS)])
def test_rope_kv_write_rotates_and_stores_in_one_pass(kernels, name, rows):
    d, dv, r, interleaved, dtype, tokens = ROPES[name]
    rows = tokens or rows
    q, k = normal(1, rows, HEADS, d), normal(1, rows, KV_HEADS, d) + 1
    v, (cos, sin) = normal(1, rows, KV_HEADS, dv), angles(rows, r)
    qkv = np.concatenate([part.reshape(1, rows, -1) for part in (q, k, v)], axis=-1)
    k_pages, v_pages, slots = pages_and_slots(rows, d, dv, dtype)
    new_k, new_v, new_q = run(
        kernels[f"rope_write_{name}"],
        qkv,
        cos,
        sin,
        slots,
        k_pages,
        v_pages,
        empty(*q.shape),
        outputs=[4, 5, 6],
    )
    np.testing.assert_allclose(new_q, rotated(q, cos, sin, interleaved), atol=TOLERANCE, rtol=0)
    check_pages(new_k, dtype, slots, rotated(k, cos, sin, interleaved), transposed=True)
    check_pages(new_v, dtype, slots, v, transposed=False)


def test_a_token_of_zeros_is_stored_as_zeros_in_int8(kernels):
    d, dv, _, _, dtype, _ = ROPES["partial_int8"]
    k_pages, v_pages, slots = pages_and_slots(3, d, dv, dtype)
    k, v = np.zeros((1, 3, KV_HEADS, d), np.float32), np.zeros((1, 3, KV_HEADS, dv), np.float32)
    new_k, _ = run(kernels["write_partial_int8"], k, v, slots, k_pages, v_pages, outputs=[3, 4])
    check_pages(new_k, dtype, slots, k, transposed=True)


def test_an_odd_rotary_dimension_is_named():
    with pytest.raises(UnsupportedError, match="33"):
        rope(heads=1, head_dim=64, rotary_dim=33)
