"""CUDA libraries are built without a GPU or driver: what is in them, and what may be missing."""

import re

import numpy as np
import pytest
import tvm
import tvm_ffi
from cuda_code import FATBIN, architectures, fat_binary, sass_by_kernel

from llmc.cuda_toolkit import find_cudart
from llmc.errors import CompileError, UsageError
from llmc.formats import FORMATS
from llmc.targets import registry
from llmc.targets.cuda import toolkit
from llmc.targets.cuda.target import CudaTarget
from llmc.targets.gpu.kernels.linear import linear_few, linear_many
from llmc.targets.gpu.kernels.norm import rms_norm
from llmc.targets.gpu.parameters import Features, GpuParameters

needs_nvcc = pytest.mark.skipif(
    toolkit.find_tool("cuobjdump") is None or find_cudart() is None,
    reason=toolkit.NVCC_HINT,
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A Relax module of one kernel a family, linked for two architectures."""
    target = CudaTarget("sm_80,sm_90")
    params = GpuParameters(features=Features(subgroup=32, max_threads=1024, shared_bytes=49152))
    plain = {"bias": False, "residual": False, "dtype": "float32", "vector_dtype": "float32"}
    functions = {
        "gemv": linear_few(FORMATS["q4_1"], 64, 128, 1, params=params.gemv, **plain),
        "gemm": linear_many(FORMATS["f16"], 64, 128, params=params.gemm, **plain),
        "norm": rms_norm(
            features=96,
            eps=1e-5,
            offset=0.0,
            heads=None,
            tokens=None,
            dtype="float32",
            vector_dtype="float32",
            params=params,
        ),
    }
    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    built = tvm.compile(tvm.IRModule(named), target=target.tvm_target)
    path = tmp_path_factory.mktemp("cuda") / target.library_name
    features = target.link(built, path)
    assert features == ["sm_80"]
    return path


@needs_nvcc
def test_machine_code_of_every_architecture_is_inside_and_no_source(library, tmp_path) -> None:
    data = library.read_bytes()
    assert data.count(FATBIN) == 1
    assert b"__global__" not in data
    assert architectures(library, tmp_path) == (["sm_80", "sm_90a"], ["sm_90"])


@needs_nvcc
def test_products_of_one_token_read_sixteen_bytes_at_a_time(library, tmp_path) -> None:
    code = fat_binary(library)
    for architecture in ("sm_80", "sm_90a"):
        by_kernel = sass_by_kernel(code, tmp_path, "-arch", architecture)
        gemv = next(text for name, text in by_kernel.items() if name.startswith("gemv"))
        assert "LDG.E.128" in gemv, architecture
        for name, text in by_kernel.items():  # registers that were spilled to memory
            assert not re.search(r"\bSTL\b", text), f"{name} of {architecture} spills"


@needs_nvcc
def test_a_library_loads_where_there_is_no_device(library) -> None:
    if tvm.cuda(0).exist:
        pytest.skip("there is one")
    module = tvm_ffi.load_module(str(library))
    assert module.implements_function("gemv", query_imports=True)
    x = tvm.runtime.tensor(np.zeros((1, 1, 96), np.float32))
    with pytest.raises(Exception, match=r"(?i)cuda|device"):
        module["norm"](x, x, x)


@pytest.mark.parametrize("level", ["sm_12", "sm_70", "sm90", "sm_80,", "sm_80 sm_90", "compute_90"])
def test_an_unknown_architecture_is_named_with_those_that_exist(level) -> None:
    with pytest.raises(UsageError, match="unknown CUDA architecture") as caught:
        CudaTarget(level)
    assert "sm_90" in (caught.value.hint or "")


def test_a_missing_compiler_is_named_with_the_command_that_brings_it(monkeypatch) -> None:
    monkeypatch.setattr(toolkit, "find_tool", lambda _: None)
    monkeypatch.setattr("llmc.targets.cuda.status.find_tool", lambda _: None)
    with pytest.raises(CompileError, match="needs nvcc") as caught:
        toolkit.compile_cuda("", ("sm_80",))
    assert "pip install" in (caught.value.hint or "")
    (cuda,) = [status for status in registry.list_targets() if status.name == "cuda"]
    assert not cuda.can_build
    assert "compiling kernels needs nvcc" in cuda.reasons
    assert "pip install" in cuda.hint


def test_a_missing_runtime_library_is_named_with_the_command_that_brings_it(monkeypatch) -> None:
    monkeypatch.setattr(toolkit.tvm_ffi, "get_global_func", lambda *_, **__: None)
    monkeypatch.setattr(toolkit, "has_driver", lambda: True)
    monkeypatch.setattr(toolkit, "find_cudart", lambda: None)
    with pytest.raises(CompileError, match=r"needs libcudart\.so\.13, which was not") as caught:
        toolkit.load_cuda_runtime.__wrapped__()
    assert 'pip install "llmc[cuda]"' in (caught.value.hint or "")


@needs_nvcc
def test_what_nvcc_refuses_is_said_in_its_words() -> None:
    with pytest.raises(CompileError, match=r"(?s)nvcc failed: .*nonsense"):
        toolkit.compile_cuda("nonsense;", ("sm_80",))
