"""What the CUDA target embeds: the fat binary of some functions, and its machine code as text."""

import re
import subprocess

import tvm

from llmc.targets.cuda import toolkit
from llmc.targets.cuda.target import CudaTarget


def machine_code(functions, architecture):
    """The fat binary that the target embeds."""
    kept = []
    target = CudaTarget(architecture)
    compile_cuda = tvm.get_global_func("tvm_callback_cuda_compile")

    def keep(code):
        kept.append(bytes(compile_cuda(code)))
        return kept[-1]

    tvm.register_global_func("tvm_callback_cuda_compile", keep, override=True)
    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    tvm.compile(tvm.IRModule(named), target=target.tvm_target)
    [code] = kept
    return code


def sass_by_kernel(code, folder):
    """The disassembly of each kernel."""
    (folder / "kernels").write_bytes(code)
    listing = subprocess.run(
        [toolkit.find_tool("cuobjdump"), "--dump-sass", "kernels"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", listing, re.S))
