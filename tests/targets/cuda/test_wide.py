"""Products of many tokens on Hopper: machine code here, numbers where there is a GPU."""

import re
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tvm

from llmc import dialect
from llmc.cuda_toolkit import find_cudart
from llmc.formats import FORMATS
from llmc.targets.base import Site
from llmc.targets.cuda import toolkit
from llmc.targets.cuda.kernels import wide
from llmc.targets.cuda.parameters import SHARED_KIB, WIDE_PLANS, WideTokens
from llmc.targets.cuda.target import CudaTarget
from llmc.targets.gpu import layout

sys.path.append(str(Path(__file__).parent.parent / "cpu"))
from cuda_code import machine_code, sass_by_kernel
from matrices import DISTINCT, random_matrix

needs_nvcc = pytest.mark.skipif(
    toolkit.find_tool("cuobjdump") is None or find_cudart() is None,
    reason=toolkit.NVCC_HINT,
)
HALVES = [f for f in DISTINCT if wide.takes(f, 64, gate=True)]
M = 320  # not whole tiles, nor whole halves of them
# Of the same product with activations and weights rounded as the kernel does. Sums are float32; now
# and then a normalized activation is rounded to the other side.
TOLERANCE = {"float16": 2e-4, "bfloat16": 1e-3}


def product(fmt, m, k, **options):
    plain = {"norm": None, "gate": None, "bias": False, "residual": False}
    dtypes = dict.fromkeys(("dtype", "vector_dtype", "norm_dtype"), "float32")
    return wide.linear_wide(
        fmt, m, k, **{**plain, **dtypes, "plan": WIDE_PLANS[fmt.bits], **options}
    )


def features_of(fmt):
    """Input features that end within a stage, where the format's groups allow it."""
    return {0: 712, 16: 592}.get(fmt.group, 640 + 3 * fmt.group)


def rounded(fmt, values):
    """As the kernel multiplies them; float16 has no infinity here."""
    if fmt.float_dtype == "bfloat16":
        return values.astype(ml_dtypes.bfloat16).astype(np.float64)
    return values.astype(np.float16).astype(np.float64)


def scales_sums(fmt, tokens):
    """Whether weights are not rounded, because their scales multiply sums of so few tokens."""
    return fmt.bits == 4 and fmt.group >= 128 and not fmt.has_min and tokens <= 16


@needs_nvcc
@pytest.mark.parametrize("name", ["bf16", "q4_1", "w4-g128"])
def test_products_take_wgmma_bulk_copies_and_no_local_memory(name, tmp_path):
    functions = {"w": product(FORMATS[name], 4096, 4096, norm=(1e-5, 0.0), gate="silu")}
    listing = sass_by_kernel(machine_code(functions, "sm_90"), tmp_path)
    products = [text for text in listing.values() if "UBLKCP" in text]
    plan = WIDE_PLANS[FORMATS[name].bits]
    assert len(products) == len(plan.kernels)
    tokens_of_groups = {step.tokens for step in plan.kernels if name == "bf16" or step.tokens > 16}
    seen = {int(n) for text in products for n in re.findall(r"HGMMA\.64x(\d+)x16", text)}
    assert seen == tokens_of_groups
    for text in products:
        assert "HGMMA" in text or "HMMA.16816" in text
        assert "SYNCS.PHASECHK" in text  # copies are awaited by barriers in shared memory
        # A code is masked and made a float16 by one instruction, of which there are few a cycle.
        assert not re.search(r"LOP3\.LUT R\d+, R\d+, 0x64006400, RZ", text)
    assert all(not re.search(r"\b(STL|LDL)\b", text) for text in listing.values())


def test_stages_fit_the_shared_memory():
    for fmt in HALVES:
        for step in WIDE_PLANS[fmt.bits].kernels:
            assert wide.shared_bytes(fmt, step) <= SHARED_KIB["sm_90"] * 1024, (fmt.name, step)


def test_blocks_share_a_tile_until_the_device_is_full():
    step = WideTokens(tokens=16, chunks=8, stages=4)
    assert wide.cluster_of(step, 2048, 16, 16) == 8
    assert wide.cluster_of(step, 4096, 16, 16) == 6
    assert wide.cluster_of(step, 4096, 5, 16) == 4  # none without a stage
    assert wide.cluster_of(step, 4096, 16, 64) == 2
    assert wide.cluster_of(step, 28672, 16, 16) == 1
    assert wide.cluster_of(step, 4096, 16, None) == 1


@pytest.mark.parametrize("wrong", [{"tokens": 24}, {"chunks": 6}, {"stages": 9}])
def test_what_the_kernel_cannot_be_made_of_is_no_step(wrong):
    right = {"tokens": 16, "chunks": 8, "stages": 4}
    WideTokens(**right)
    with pytest.raises(AssertionError):
        WideTokens(**{**right, **wrong})


@needs_nvcc
@pytest.mark.parametrize(
    ("level", "name", "max_tokens", "rule"),
    [
        ("sm_90", "bf16", 2048, "cuda.wide"),
        ("sm_90", "q4_0", 2048, "cuda.wide"),
        ("sm_90", "q4_0", 8, "cuda.tensor_cores"),
        ("sm_80,sm_90", "q4_0", 2048, "cuda.tensor_cores"),
        ("sm_90", "fp8", 2048, "cuda.tensor_cores"),
        ("sm_90", "f32", 2048, "gpu.gemm"),
    ],
)
def test_artifacts_of_hopper_alone_have_them(level, name, max_tokens, rule):
    tokens = tvm.tirx.Var("T", "int64")
    types = {
        "x": tvm.relax.TensorType([1, tokens, 64], "float32"),
        "weight": tvm.relax.TensorType([96, 64], "float32"),
    }
    op = dialect.Linear(format=name)
    site = Site(op=op, types=types, max_tokens=max_tokens, tokens=None, num_groups=1, page_size=16)
    target = CudaTarget(level)
    assert next(n for n, make in target.kernel_rules if make(site) is not None) == rule
    fused = target.fuses(FORMATS[name], 64, 64, max_tokens)
    assert fused == (rule == "cuda.wide")


@pytest.fixture(scope="module")
def kernels():
    named = {}
    for fmt in HALVES:
        name, k = fmt.name.replace("-", "_"), features_of(fmt)
        named[name] = product(fmt, M, k, bias=True, residual=True)
        named[f"{name}_gate"] = product(fmt, M, k, norm=(1e-5, 1.0), gate="silu", bias=True)
    named = {n: f.with_attr("global_symbol", n) for n, f in named.items()}
    return tvm.compile(tvm.IRModule(named), target=CudaTarget("sm_90").tvm_target)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 17, 33, 65, 130, 300, 700])
@pytest.mark.parametrize("fmt", HALVES, ids=lambda f: f.name)
def test_products_and_what_is_around_them_match_float64(kernels, fmt, tokens, gate):
    rng, k = np.random.default_rng(tokens), features_of(fmt)
    matrix, exact = random_matrix(rng, fmt, M, k)
    x = rng.standard_normal((1, tokens, k))
    norm, bias = rng.standard_normal(k), rng.standard_normal(M)
    residual = rng.standard_normal((1, tokens, M))
    weights = layout.pack(fmt, [matrix])
    if fmt.group and not scales_sums(fmt, tokens):
        exact = rounded(fmt, exact)
    if gate:
        normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * (norm + 1)
        sums = rounded(fmt, normed) @ exact.T + bias
        expected = sums[..., : M // 2] / (1 + np.exp(-sums[..., : M // 2])) * sums[..., M // 2 :]
        arrays = [x, norm, *weights, bias]
    else:
        expected = rounded(fmt, x) @ exact.T + bias + residual
        arrays = [x, *weights, bias, residual]
    arrays = [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays]
    y = tvm.runtime.tensor(np.full(expected.shape, np.nan, np.float32), tvm.cuda(0))
    name = fmt.name.replace("-", "_") + ("_gate" if gate else "")
    kernels[name](*(tvm.runtime.tensor(a, tvm.cuda(0)) for a in arrays), y)
    error = np.linalg.norm(y.numpy() - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[fmt.float_dtype or "float16"]
