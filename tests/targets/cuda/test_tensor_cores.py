"""Products on tensor cores: their machine code here, their numbers where there is a GPU."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm

from llmc import dialect
from llmc.cuda_toolkit import find_cudart
from llmc.formats import FORMATS
from llmc.targets.base import Site
from llmc.targets.cuda import toolkit
from llmc.targets.cuda.kernels.tensor_cores import linear_tensor_cores, shared_bytes
from llmc.targets.cuda.parameters import PLANS, ManyTokens
from llmc.targets.cuda.target import CudaTarget
from llmc.targets.gpu import layout

sys.path.append(str(Path(__file__).parent.parent / "cpu"))
from cuda_code import machine_code, sass_by_kernel
from matrices import DISTINCT, random_matrix

needs_nvcc = pytest.mark.skipif(
    toolkit.find_tool("cuobjdump") is None or find_cudart() is None,
    reason=toolkit.NVCC_HINT,
)
HALVES = [f for f in DISTINCT if f.bits <= 16]
M = 70  # neither a multiple of a panel nor of a tile
# Activations and dequantized weights are rounded to 11 bits (bfloat16: 8), which leaves an error of
# some 2^-12 (2^-9) of the norm; sums are float32.
TOLERANCE = {"float16": 6e-4, "bfloat16": 4e-3}
MOST_SHARED = 99 * 1024  # of a block, on the devices that have least of it


def features_of(fmt):
    """Input features that end within a chunk, where the format's groups allow it."""
    if fmt.sub_scales is not None:
        return 512
    return {0: 102, 16: 80}.get(fmt.group, 3 * fmt.group)


def build(functions, architecture):
    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    return tvm.compile(tvm.IRModule(named), target=CudaTarget(architecture).tvm_target)


def product(fmt, m, k, **options):
    options = {"dtype": "float32", "vector_dtype": "float32", **options}
    options = {"bias": True, "residual": True, "plan": PLANS[fmt.bits], **options}
    return linear_tensor_cores(fmt, m, k, **options)


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_kernel_multiplies_on_tensor_cores_and_keeps_to_registers(architecture, tmp_path):
    """Fragments come 16 bytes at a time, tiles asynchronously, and nothing is spilled."""
    functions = {f"w{n}": product(FORMATS[n], 4096, 4096) for n in ("bf16", "q4_0", "q6_k")}
    kernels = sass_by_kernel(machine_code(functions, architecture), tmp_path)
    products = {name: text for name, text in kernels.items() if not name.endswith("_kernel")}
    assert len(products) == sum(len(PLANS[bits].kernels) for bits in (16, 4, 8))
    for name, text in products.items():
        kind = "HMMA.16816.F32.BF16" if "bf16" in name else "HMMA.16816.F32 "
        if (architecture, name) == ("sm_90", "wbf16_kernel_4"):
            kind = "HGMMA.64x128x16.F32.BF16"
        assert kind in text, name
        assert re.search(r"LDG\.E\S*\.128|LDGSTS\.E\S*\.128", text), name
        assert not re.search(r"\b(STL|LDL)\b", text), f"{name} spills"
    assert any("LDGSTS" in text for text in products.values())


@needs_nvcc
@pytest.mark.parametrize(
    ("architecture", "converts"), [("sm_80", False), ("sm_89", True), ("sm_90", True)]
)
def test_fp8_weights_become_float16_by_the_chips_own_conversion(tmp_path, architecture, converts):
    """Chips that lack it, below sm_89, move an exponent's bits instead."""
    code = machine_code({"fp8": product(FORMATS["fp8"], 4096, 4096)}, architecture)
    products = [t for n, t in sass_by_kernel(code, tmp_path).items() if not n.endswith("_kernel")]
    assert len(products) == len(PLANS[8].kernels)
    for text in products:
        assert ("F2FP.F16.E4M3.UNPACK_B" in text) == converts
        assert "HMMA.16816.F32 " in text
        assert not re.search(r"\b(STL|LDL)\b", text)


@pytest.mark.parametrize("fmt", HALVES, ids=lambda f: f.name)
def test_tiles_fit_the_shared_memory_of_every_architecture(fmt):
    for step in PLANS[fmt.bits].kernels:
        assert shared_bytes(fmt, step) <= MOST_SHARED, step


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "max_tokens", "rule"),
    [
        ("bf16", 4096, "cuda.tensor_cores"),
        ("q4_0", 4096, "cuda.tensor_cores"),
        ("q4_0", 8, "cuda.tensor_cores"),
        ("f32", 8, "gpu.few"),
        ("f32", 4096, "gpu.gemm"),
    ],
)
def test_float32_weights_keep_exact_products(name, max_tokens, rule):
    tokens = tvm.tirx.Var("T", "int64")
    types = {
        "x": tvm.relax.TensorType([1, tokens, 64], "float32"),
        "weight": tvm.relax.TensorType([96, 64], "float32"),
    }
    site = Site(
        op=dialect.Linear(format=name),
        types=types,
        max_tokens=max_tokens,
        tokens=None,
        num_groups=1,
        page_size=16,
    )
    rules = CudaTarget().kernel_rules
    assert next(found for found, make in rules if make(site) is not None) == rule


@pytest.fixture(scope="module")
def kernels():
    functions = {f.name.replace("-", "_"): product(f, M, features_of(f)) for f in HALVES}
    half = {"dtype": "float16", "vector_dtype": "float16"}
    functions["half"] = product(FORMATS["q4_1"], M, 96, bias=False, residual=False, **half)
    return build(functions, "sm_80,sm_90")


def run(kernel, *arrays):
    """The last array, after the kernel has written it."""
    tensors = [tvm.runtime.tensor(array, tvm.cuda(0)) for array in arrays]
    kernel(*tensors)
    return tensors[-1].numpy()


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 9, 16, 17, 64, 65, 200])
@pytest.mark.parametrize("fmt", HALVES, ids=lambda f: f.name)
def test_products_of_every_format_with_bias_and_residual(kernels, fmt, tokens):
    rng, k = np.random.default_rng(tokens), features_of(fmt)
    matrix, exact = random_matrix(rng, fmt, M, k)
    x, residual = (rng.standard_normal((1, tokens, n)).astype(np.float32) for n in (k, M))
    bias = rng.standard_normal(M).astype(np.float32)
    y = np.full((1, tokens, M), np.nan, np.float32)
    weights = layout.pack(fmt, [matrix], stacked=False)
    y = run(kernels[fmt.name.replace("-", "_")], x, *weights, bias, residual, y)
    expected = x.astype(np.float64) @ exact.T
    error = relative_error(y - bias - residual, expected)
    assert error < TOLERANCE[fmt.float_dtype or "float16"]


@pytest.mark.gpu
def test_activations_too_large_for_float16_become_the_largest(kernels):
    fmt = FORMATS["q4_1"]
    matrix, exact = random_matrix(np.random.default_rng(1), fmt, M, 96)
    x = np.zeros((1, 20, 96), np.float32)
    x[0, :, 5] = 1e6
    weights = layout.pack(fmt, [matrix], stacked=False)
    y = np.full((1, 20, M), np.nan, np.float32)
    zeros = np.zeros(M, np.float32), np.zeros((1, 20, M), np.float32)
    y = run(kernels["q4_1"], x, *weights, *zeros, y)
    assert relative_error(y[0, 3], exact[:, 5] * 65504) < TOLERANCE["float16"]


@pytest.mark.gpu
def test_float16_activations(kernels):
    fmt, rng = FORMATS["q4_1"], np.random.default_rng(2)
    matrix, exact = random_matrix(rng, fmt, M, 96)
    x = rng.standard_normal((1, 33, 96)).astype(np.float16)
    weights = layout.pack(fmt, [matrix], stacked=False)
    y = run(kernels["half"], x, *weights, np.full((1, 33, M), np.nan, np.float16))
    assert relative_error(y, x.astype(np.float64) @ exact.T) < 1e-3  # y is rounded too


@pytest.mark.parametrize(
    "wrong", [{"rows": 48}, {"warp_rows": 48}, {"warp_tokens": 12}, {"stages": 1}]
)
def test_a_tile_that_does_not_divide_is_no_tile(wrong):
    right = {"rows": 64, "tokens": 64, "warp_rows": 32, "warp_tokens": 32, "depth": 1, "stages": 2}
    ManyTokens(**right)
    with pytest.raises(AssertionError):
        ManyTokens(**{**right, **wrong})
