"""Launches that begin before the one in front has ended (programmatic dependent launch, sm_90).

A kernel of a decode step runs for microseconds, as long as it takes to launch the next. Launched
ahead, the next one has its blocks in place, and first weights on their way, by the time its input
is there. Every kernel says when that is: it waits for what the launch before wrote, then allows the
launch behind. Code of ours does so where it wants to (`await_inputs` in fragments.cuh); the others
begin with it. That a launch waits for the one before, which waited itself, orders it behind all: so
each has to wait, in every block. To allow before waiting is as right, but took longer (H200).
"""

from __future__ import annotations

import re
from functools import cache

import tvm
import tvm_ffi

_TAG = "tirx.use_programtic_dependent_launch"
_PARAMS = "tirx.kernel_launch_params"
_DYNAMIC = "tirx.use_dyn_shared_memory"
_BUILD = "target.build.cuda"
_KERNEL = re.compile(r'(extern "C" __global__[^{]*\{)')
_WAIT = (
    '\n#if __CUDA_ARCH__ >= 900\n  asm volatile("griddepcontrol.wait;" ::: "memory");\n'
    '  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");\n#endif\n'
)
# What calls await_inputs itself.
_AWAITS = (
    *("llmc::gemv<", "llmc::stream<", "llmc::arrange_wide<", "llmc::multiply_wide<"),
    *("llmc::attend<", "llmc::attend_one<", "llmc::merge_parts<"),
)


def overlap_launches(wanted: bool) -> None:
    """Whether kernels built from now on are launched ahead; it is one setting for the process.

    Devices before sm_90 do not know such launches.
    """
    build = _original_build()

    def tagged(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.runtime.Module:
        out = mod.clone()
        for name, func in mod.functions_items():
            if wanted and func.attrs and _PARAMS in func.attrs:
                params = [str(p) for p in func.attrs[_PARAMS]]
                # The runtime wants to see dynamic shared memory last.
                last = len(params) - (_DYNAMIC in params)
                out[name] = func.with_attr(_PARAMS, [*params[:last], _TAG, *params[last:]])
        return build(out, target)

    tvm_ffi.register_global_func(_BUILD, tagged, override=True)


def await_launches(code: str) -> str:
    """CUDA C++ of kernels, each of which waits for the launch before it."""
    pieces = _KERNEL.split(code)
    for at in range(1, len(pieces), 2):
        if not any(name in pieces[at + 1] for name in _AWAITS):
            pieces[at] += _WAIT
    return "".join(pieces)


@cache
def _original_build() -> tvm_ffi.Function:
    return tvm_ffi.get_global_func(_BUILD)
