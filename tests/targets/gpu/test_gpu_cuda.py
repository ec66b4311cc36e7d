"""The same kernels as CUDA: what TVM prints for them compiles and keeps to registers."""

import re
import shutil
import subprocess

import pytest
import tvm

from llmc.formats import FORMATS
from llmc.targets.gpu.kernels.argmax import argmax_parts
from llmc.targets.gpu.kernels.attention import paged_attention
from llmc.targets.gpu.kernels.draw import draw
from llmc.targets.gpu.kernels.grouped_linear import grouped_linear
from llmc.targets.gpu.kernels.kv_write import rope_kv_write
from llmc.targets.gpu.kernels.linear import linear_few, linear_many
from llmc.targets.gpu.kernels.norm import add_rms_norm
from llmc.targets.gpu.kernels.token_limits import limits_histogram, limits_narrow
from llmc.targets.gpu.parameters import Features, GpuParameters

ARCH = "sm_90"
TARGET = {
    "kind": "cuda",
    "arch": ARCH,
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 49152,
    "thread_warp_size": 32,
}
PARAMS = GpuParameters(features=Features(subgroup=32, max_threads=1024, shared_bytes=49152))
HALF = {"dtype": "float16", "vector_dtype": "float16"}
PAGES = {"page_size": 16, "kv_dtype": "float16", "group": 0, "num_groups": 1, "tokens": None}


def functions():
    product = {"bias": False, "residual": True, **HALF}
    q4, f16 = FORMATS["w4-g128"], FORMATS["f16"]
    return {
        "gemv": linear_few(q4, 4096, 4096, 1, params=PARAMS.gemv, **product),
        "few": linear_few(f16, 4096, 4096, None, params=PARAMS.few, **product),
        "gemm": linear_many(q4, 4096, 4096, params=PARAMS.gemm, **product),
        "experts": grouped_linear(
            q4,
            8,
            1024,
            2048,
            2,
            tokens=None,
            per_token_input=True,
            bias=True,
            params=PARAMS.gemv,
            **HALF,
        ),
        "norm": add_rms_norm(
            features=4096, eps=1e-5, offset=0.0, tokens=None, params=PARAMS, **HALF
        ),
        "write": rope_kv_write(
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            v_head_dim=128,
            rotary_dim=128,
            dtype="float16",
            params=PARAMS,
            **PAGES,
        ),
        "attention": paged_attention(
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            v_head_dim=128,
            scale=0.1,
            window=None,
            softcap=None,
            sinks=False,
            dtype="float16",
            sink_dtype="float32",
            params=PARAMS,
            **PAGES,
        ),
        "argmax": argmax_parts(128256, PARAMS.sampling),
        "histogram": limits_histogram(128256, PARAMS.sampling),
        "narrow": limits_narrow(128256, PARAMS.sampling),
        "draw": draw(128256, PARAMS.sampling),
    }


@pytest.fixture(scope="module")
def source():
    """CUDA source of every kernel; neither a GPU nor a driver is needed for it."""
    named = {n: f.with_attr("global_symbol", n) for n, f in functions().items()}
    built = tvm.compile(tvm.IRModule(named), target=tvm.target.Target(TARGET, host="llvm"))
    [device] = built.mod.imports
    return device.inspect_source()


def body(source, kernel):
    """The text of one kernel."""
    [text] = re.findall(
        rf"__global__ void [^;{{]*\b{kernel}_kernel\([^;{{]*\{{(.*?)^\}}", source, re.M | re.S
    )
    return text


def test_weights_are_loaded_16_bytes_at_a_time(source):
    for kernel in ("gemv", "few", "gemm", "experts"):
        assert re.search(r"= \*\(int4\*\)\(weight_\w+_ptr", body(source, kernel)), kernel


def test_reductions_shuffle_where_the_device_has_subgroups(source):
    for kernel in ("norm", "attention"):
        assert "__shfl_xor_sync" in body(source, kernel), kernel


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_compile_without_spilling_registers(source, tmp_path):
    path = tmp_path / "kernels.cu"
    path.write_text(source)
    command = ["nvcc", "-w", "-cubin", f"-arch={ARCH}", "-Xptxas", "-v", path.name, "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    names = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
    spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
    # Attention is two launches, everything else is one.
    assert len(names) == len(spills) == len(functions()) + 1
    assert dict(zip(names, spills, strict=True)) == dict.fromkeys(names, "0")
