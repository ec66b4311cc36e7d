"""Launches ahead: every kernel waits, once, and artifacts for older GPUs are launched as before."""

import pytest
import tvm

from llmc.cuda_toolkit import find_cudart
from llmc.formats import FORMATS
from llmc.targets.cuda import toolkit
from llmc.targets.cuda.kernels import gemv
from llmc.targets.cuda.launches import await_launches
from llmc.targets.cuda.parameters import gemv_plan
from llmc.targets.cuda.target import CudaTarget

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


@needs_nvcc
@pytest.mark.parametrize(
    ("architectures", "ahead"), [("sm_90", True), ("sm_80,sm_90", False), ("sm_80", False)]
)
def test_only_artifacts_of_hopper_and_newer_are_launched_ahead(architectures, ahead, tmp_path):
    func = gemv.gemv(
        FORMATS["q4_0"],
        64,
        64,
        norm=None,
        gate=None,
        bias=False,
        residual=False,
        dtype="float32",
        vector_dtype="float32",
        norm_dtype="float32",
        plan=gemv_plan(64),
    )
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
