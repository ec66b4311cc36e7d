"""Products of one token: their machine code here, their numbers where there is a GPU."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm

from llmc.cuda_toolkit import find_cudart
from llmc.formats import FORMATS
from llmc.targets.cuda import toolkit
from llmc.targets.cuda.kernels import gemv
from llmc.targets.cuda.parameters import STREAM_BYTES, StreamPlan, gemv_plan
from llmc.targets.cuda.target import CudaTarget
from llmc.targets.gpu import layout

sys.path.append(str(Path(__file__).parent.parent / "cpu"))
from cuda_code import machine_code, sass_by_kernel
from gemv_cases import TOLERANCE
from matrices import DISTINCT, random_matrix

needs_nvcc = pytest.mark.skipif(
    toolkit.find_tool("cuobjdump") is None or find_cudart() is None,
    reason=toolkit.NVCC_HINT,
)
M = 192
FUSED = [f for f in DISTINCT if gemv.takes(f, M, 96)]


# Blocks of a cluster on one panel, of its own each, and where most have none.
STREAMS = [
    StreamPlan(cluster=4, blocks=8, stages=2),
    StreamPlan(cluster=2, blocks=12, stages=3),
    StreamPlan(cluster=1, blocks=132, stages=3),
]


def product(fmt, m, k, **options):
    plain = {"norm": None, "gate": None, "bias": False, "residual": False}
    dtypes = dict.fromkeys(("dtype", "vector_dtype", "norm_dtype"), "float32")
    return gemv.gemv(fmt, m, k, **{**plain, **dtypes, "plan": gemv_plan(k), **options})


def features_of(fmt):
    """Input features that end within a superblock where scales allow it; more than a stage has."""
    return 1280 if fmt.sub_scales is not None else 11 * max(96, 3 * fmt.group)


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_weights_are_read_16_bytes_at_a_time_and_nothing_is_spilled(architecture, tmp_path):
    names = {"bf16": "FFMA", "q4_0": "IDP.4A.U8.S8", "q8_0": "IDP.4A.S8.S8", "q6_k": "IDP.4A"}
    functions = {n: product(FORMATS[n], 4096, 4096, norm=(1e-5, 0.0)) for n in names}
    listing = sass_by_kernel(machine_code(functions, architecture), tmp_path)
    for name, text in ((n, listing[f"{n}_kernel"]) for n in names):
        assert names[name] in text, name
        assert re.search(r"LDG\.E\S*\.128", text), name
        assert not re.search(r"\b(STL|LDL)\b", text), f"{name} spills"


@needs_nvcc
def test_on_hopper_alone_weights_are_copied_in_bulk_and_nothing_is_spilled(tmp_path):
    """What is kept for later in memory before the first product counts for nothing."""
    functions, multiplies = {}, {"bf16": "FFMA", "w4_g128": "IMMA.16832.U8.S8"}
    for name in ("bf16", "w4-g128"):
        plan = gemv.plan_for(FORMATS[name], 4096, 4096, gate=False, hopper=True)
        options = {"norm": (1e-5, 0.0), "plan": plan}
        functions[name.replace("-", "_")] = product(FORMATS[name], 4096, 4096, **options)
    listing = sass_by_kernel(machine_code(functions, "sm_90"), tmp_path)
    for name, instruction in multiplies.items():
        text = listing[f"{name}_kernel"]
        assert "UBLKCP" in text, name
        assert not re.search(r"\b(STL|LDL)\b", text[text.index(instruction) :]), f"{name} spills"


@pytest.mark.parametrize(
    ("m", "k", "cluster"), [(3072, 2048, 4), (2048, 2048, 2), (16384, 2048, 1), (4096, 14336, 2)]
)
def test_blocks_share_panels_where_else_some_had_none(m, k, cluster):
    plan = gemv.plan_for(FORMATS["bf16"], m, k, gate=False, hopper=True)
    assert plan.cluster == cluster
    assert gemv.stream_bytes(FORMATS["bf16"], m, k, plan, gate=False) <= STREAM_BYTES
    assert gemv.plan_for(FORMATS["bf16"], m, k, gate=False, hopper=False) == gemv_plan(k)


def test_what_it_does_not_take_is_left_to_others():
    assert gemv.takes(FORMATS["q4_0"], 4096, 4096)
    for name, m, k in (("f32", 96, 96), ("fp8", 96, 96), ("bf16", 96, 100), ("bf16", 100, 96)):
        assert not gemv.takes(FORMATS[name], m, k), (name, m, k)


def kernels_of(plan):
    """A product of every format, plain and with a gate, by name."""
    options = {"norm": (1e-5, 1.0), "bias": True}
    named = {}
    for fmt in FUSED:
        name, k = fmt.name.replace("-", "_"), features_of(fmt)
        chosen = {"plan": plan or gemv_plan(k), **options}
        named[name] = product(fmt, M, k, residual=True, **chosen)
        named[f"{name}_gate"] = product(fmt, M, k, gate="silu", **chosen)
    return {n: f.with_attr("global_symbol", n) for n, f in named.items()}


@pytest.fixture(scope="module", params=[None, *STREAMS], ids=["gemv", "4", "2", "1"])
def kernels(request):
    architecture = "sm_80,sm_90" if request.param is None else "sm_90"
    functions = kernels_of(request.param)
    return tvm.compile(tvm.IRModule(functions), target=CudaTarget(architecture).tvm_target)


def example(fmt, gate):
    """(the kernel's arrays without the output, the output in float64)."""
    rng, k = np.random.default_rng(3), features_of(fmt)
    matrix, exact = random_matrix(rng, fmt, M, k)
    x, g = 5 * rng.standard_normal((1, 1, k)), rng.standard_normal(k)
    bias, residual = rng.standard_normal(M), rng.standard_normal((1, 1, M))
    normed = x / np.sqrt(np.mean(x**2) + 1e-5) * (g + 1)
    expected = (normed @ exact.T + bias).ravel()
    arrays = [x, g, *layout.pack(fmt, [matrix], stacked=False), bias]
    if gate:
        half = expected[: M // 2]
        expected = half / (1 + np.exp(-half)) * expected[M // 2 :]
    else:
        expected, arrays = expected + residual.ravel(), [*arrays, residual]
    return [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays], expected


@pytest.mark.gpu
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("fmt", FUSED, ids=lambda f: f.name)
def test_norm_product_and_what_follows_match_float64(kernels, fmt, gate):
    arrays, expected = example(fmt, gate)
    y = tvm.runtime.tensor(np.full((1, 1, len(expected)), np.nan, np.float32), tvm.cuda(0))
    name = fmt.name.replace("-", "_") + ("_gate" if gate else "")
    kernels[name](*(tvm.runtime.tensor(a, tvm.cuda(0)) for a in arrays), y)
    error = np.linalg.norm(y.numpy().ravel() - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[fmt.is_float]
