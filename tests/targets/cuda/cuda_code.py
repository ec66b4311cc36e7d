"""What the CUDA target embeds: the fat binary of some functions, and its machine code as text."""

import re
import struct
import subprocess
from pathlib import Path

import tvm

from llmc.targets.cuda import toolkit
from llmc.targets.cuda.target import CudaTarget

FATBIN = bytes.fromhex("50ed55ba")  # the magic number of a fat binary, little-endian


def fat_binary(library: Path) -> bytes:
    """The first fat binary in the library: its header has its own length and the rest's."""
    data = library.read_bytes()
    begin = data.index(FATBIN)
    header, rest = struct.unpack("<HQ", data[begin + 6 : begin + 16])
    return data[begin : begin + header + rest]


def architectures(library: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Those of the library's machine code, and of its PTX."""
    (folder / "kernels").write_bytes(fat_binary(library))
    listed = subprocess.run(
        [toolkit.find_tool("cuobjdump"), "--list-elf", "--list-ptx", "kernels"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return re.findall(r"(sm_\w+)\.cubin", listed), re.findall(r"(sm_\d+)\.ptx", listed)


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


def sass_by_kernel(code, folder, *options):
    """The disassembly of each kernel; `options` are cuobjdump's."""
    (folder / "kernels").write_bytes(code)
    listing = subprocess.run(
        [toolkit.find_tool("cuobjdump"), "--dump-sass", *options, "kernels"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", listing, re.S))
