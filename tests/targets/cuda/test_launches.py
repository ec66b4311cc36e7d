"""Launches ahead: every kernel waits, once, and artifacts for older GPUs are launched as before."""

from functools import partial

import pytest
import tvm
from cuda_code import machine_code, sass_by_kernel

from llmc.cuda_toolkit import find_cudart
from llmc.formats import FORMATS
from llmc.targets.cuda import toolkit
from llmc.targets.cuda.kernels import attention_decode, gemv, wide
from llmc.targets.cuda.kernels.attention import flash, flash_plan
from llmc.targets.cuda.launches import await_launches
from llmc.targets.cuda.parameters import SHARED_KIB, WIDE_PLANS, DecodePlan, gemv_plan
from llmc.targets.cuda.target import CudaTarget
from llmc.targets.gpu.kernels.attention import paged_attention
from llmc.targets.gpu.parameters import GpuParameters

TAG = b"tirx.use_programtic_dependent_launch"
DYNAMIC = b"tirx.use_dyn_shared_memory"
needs_nvcc = pytest.mark.skipif(
    toolkit.find_tool("nvcc") is None or find_cudart() is None, reason=toolkit.NVCC_HINT
)


def test_kernels_wait_at_their_start_unless_their_own_code_does():
    code = (
        'extern "C" __global__ void __launch_bounds__(32) a_kernel(float* x) {\n  x[0] = 1;\n}\n'
        'extern "C" __global__ void b_kernel(float* x) {\n  llmc::gemv<int, 8>(x);\n}\n'
    )
    first, second = await_launches(code).split("b_kernel")
    assert first.count("griddepcontrol.wait") == 1
    assert first.index("griddepcontrol.wait") < first.index("x[0] = 1")
    assert first.index("griddepcontrol.wait") < first.index("launch_dependents")
    assert "griddepcontrol" not in second


PLAIN = {
    **dict.fromkeys(("norm", "gate"), None),
    **dict.fromkeys(("bias", "residual"), False),
    **dict.fromkeys(("dtype", "vector_dtype", "norm_dtype"), "float32"),
}


@needs_nvcc
@pytest.mark.skipif(toolkit.find_tool("cuobjdump") is None, reason=toolkit.NVCC_HINT)
def test_the_machine_code_of_all_own_kernels_waits(tmp_path):
    fmt = FORMATS["w4-g128"]
    shared = SHARED_KIB["sm_90"] * 1024
    attention = paged_attention(
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        v_head_dim=128,
        page_size=16,
        kv_dtype="uint16",
        scale=0.1,
        window=None,
        softcap=None,
        sinks=False,
        group=0,
        num_groups=1,
        tokens=None,
        dtype="float32",
        sink_dtype="float32",
        params=GpuParameters(),
        prefill=partial(flash, plan=flash_plan(128, 128, 16, "uint16", shared)),
        decode=partial(attention_decode.decode, plan=DecodePlan()),
    )
    plan = gemv.plan_for(fmt, 4096, 4096, gate=False, hopper=True)
    functions = {
        "attention": attention,
        "stream": gemv.gemv(fmt, 4096, 4096, **PLAIN, plan=plan),
        "gemv": gemv.gemv(fmt, 4096, 4096, **PLAIN, plan=gemv_plan(4096)),
        "wide": wide.linear_wide(fmt, 4096, 4096, **PLAIN, plan=WIDE_PLANS[4]),
    }
    listing = sass_by_kernel(machine_code(functions, "sm_90"), tmp_path)
    assert len(listing) > len(functions)
    assert {name for name, text in listing.items() if "ACQBULK" not in text} == set()


@needs_nvcc
@pytest.mark.parametrize(
    ("architectures", "ahead"), [("sm_90", True), ("sm_80,sm_90", False), ("sm_80", False)]
)
def test_only_artifacts_of_hopper_and_newer_are_launched_ahead(architectures, ahead, tmp_path):
    func = gemv.gemv(FORMATS["q4_0"], 64, 64, **PLAIN, plan=gemv_plan(64))
    target = CudaTarget(architectures)
    module = tvm.compile(
        tvm.IRModule({"product": func.with_attr("global_symbol", "product")}),
        target=target.tvm_target,
    )
    library = tmp_path / "kernels.so"
    module.export_library(str(library))
    stored = library.read_bytes()
    assert (TAG in stored) == ahead
    if ahead:  # the runtime wants to see dynamic shared memory last
        assert stored.index(DYNAMIC, stored.index(TAG)) - stored.index(TAG) < 64
