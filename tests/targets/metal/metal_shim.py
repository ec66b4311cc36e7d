"""Runs the kernels' Metal sources on this machine's CPU, translated by g++ with shim/metal_stdlib.

The same PrimFuncs, the same code generator and the same source text as in an artifact: only that
host code is for this machine and arguments lie in its memory. Every kernel's threads run once from
first to last and once from last to first; both have to give the same.
"""

import hashlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tvm
import tvm_ffi

from llmc.targets.metal.target import MetalTarget

HERE = Path(__file__).parent / "shim"
COMPILER = shutil.which("g++")
_HEADER = re.compile(r"kernel void (\w+)\((.*?)\) \{", re.DOTALL)
_THREADGROUP = re.compile(r"^ *threadgroup (\w+) (\w+)\[(\d+)\];$", re.MULTILINE)
_PARAMETER = re.compile(r"(?:device (\w+)\* (\w+)|constant (\w+)& (\w+)) \[\[ buffer\((\d+)\) \]\]")
_GUARD = 64  # elements behind an array of threadgroup memory that nobody may write
_AXES = ("blockIdx.x", "blockIdx.y", "blockIdx.z", "threadIdx.x", "threadIdx.y", "threadIdx.z")

# What TVM's host code calls: tvm_ffi's C interface, of which a value's last 8 bytes are all that
# counts here. Arguments are pointers, then 8 bytes a number, then the launch's extents.
_PREFIX = """
#include <metal_stdlib>
#include <dlfcn.h>
using namespace metal;
struct Value {
  int type, padding;
  union { void* pointer; long integer; unsigned char bytes[8]; };
};
static bool backwards = false;
extern "C" int __tvm_ffi_run_backwards(void*, const Value* args, int, Value*) {
  backwards = args[0].integer != 0;
  return 0;
}
"""


@dataclass(frozen=True)
class Source:
    """One kernel as TVM printed it, and the order of its launch's extents."""

    name: str
    text: str
    launch: list[str]

    def translated(self) -> str:
        """C++ that defines the kernel and the function that TVM calls."""
        text = self.text[self.text.index("using namespace metal;") + 22 :]
        text = text.replace("union __TVMArgUnion {\n int v_int[2];\n};\n", "")
        arrays = _THREADGROUP.findall(text)
        text = _THREADGROUP.sub("", text).replace("threadgroup ", "")
        memory = [f"alignas(16) static {kind} {name}[{n} + {_GUARD}];" for kind, name, n in arrays]
        spoils = [f"std::memset({name}, 0xff, sizeof({name}));" for _, name, _ in arrays]
        checks = [f"shim::check_guard({name} + {n}, {_GUARD});" for _, name, n in arrays]
        return "\n".join(
            [
                f"namespace in_{self.name} {{",
                *memory,
                text,
                "static const Value* values;",
                f"static void spoil() {{ {' '.join(spoils)} }}",
                f"static void check() {{ {' '.join(checks)} }}",
                "static void body(shim::Index block, shim::Index in_block) {",
                self._call(),
                "}",
                "}",
                f'extern "C" int __tvm_ffi_{self.name}(void*, const Value* args, int, Value*) {{',
                f"  in_{self.name}::values = args;",
                self._launch(),
                "  return 0;",
                "}",
            ]
        )

    def _parameters(self) -> list[tuple[str, str, str, str, str]]:
        header = _HEADER.search(self.text)
        assert header is not None, self.text
        return _PARAMETER.findall(header[2])

    @property
    def num_numbers(self) -> int:
        """Arguments that are no buffers."""
        struct = re.search(r"struct \w+_args_t \{(.*?)\};", self.text, re.DOTALL)
        return len(re.findall(";", struct[1])) if struct else 0

    def _call(self) -> str:
        lines, arguments, buffers = [], [], 0
        for kind, _, struct, _, number in self._parameters():
            if struct:
                lines.append(f"alignas(8) unsigned char packed[8 * {self.num_numbers}];")
                lines += [
                    f"std::memcpy(packed + {8 * i}, values[{buffers + i}].bytes, 8);"
                    for i in range(self.num_numbers)
                ]
                arguments.append(f"*reinterpret_cast<const {struct}*>(packed)")
            else:
                assert int(number) == buffers, self.text
                arguments.append(f"static_cast<{kind}*>(values[{buffers}].pointer)")
                buffers += 1
        call = f"{self.name}({', '.join([*arguments, 'block', 'in_block'])});"
        return "\n".join(f"  {line}" for line in [*lines, call])

    def _launch(self) -> str:
        first = len([p for p in self._parameters() if p[0]]) + self.num_numbers
        extents = dict.fromkeys(_AXES, "1u")
        for place, tag in enumerate(self.launch):
            extents[tag] = f"(uint)args[{first + place}].integer"
        grid, group = ([extents[a] for a in _AXES[s]] for s in (slice(0, 3), slice(3, 6)))
        sizes = f"{{{', '.join(grid)}}}, {{{', '.join(group)}}}"
        functions = ", ".join(f"in_{self.name}::{name}" for name in ("body", "spoil", "check"))
        return f"  shim::run({sizes}, backwards, {functions});"


def build(functions, edit=str):
    """A library of many kernels, their sources changed by `edit`; its tensors are the CPU's."""
    kept: list[tvm_ffi.Module] = []

    def create(sources, _, infos, *__):
        found = [
            Source(str(name), edit(_text(source)), [str(t) for t in infos[name].launch_param_tags])
            for name, source in sources.items()
        ]
        kept.append(tvm_ffi.load_module(str(_compile(found))))
        return kept[-1]

    tvm_ffi.register_global_func("ffi.Module.create.metal", create, override=True)
    try:
        named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
        module = tvm.compile(tvm.IRModule(named), target=host_target())
    finally:
        tvm_ffi.registry.remove_global_func("ffi.Module.create.metal")
    return Library(module, kept[0])


class Library:
    """Kernels by name."""

    def __init__(self, module, kernels):
        self.module, self._set = module, kernels["run_backwards"]

    def __getitem__(self, name):
        def call(*tensors):
            self.module[name](*tensors)

        call.set_backwards = self._set
        return call


def run(kernel, *arrays, outputs):
    """Calls the kernel with `arrays`, of which those at the indices `outputs` come back."""
    results = []
    for backwards in (0, 1):
        kernel.set_backwards(backwards)
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        kernel(*tensors)
        results.append([tensors[i].numpy() for i in outputs])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other, err_msg="depends on the order of the threads")
    return results[0]


@cache
def host_target():
    """The target's own, with this machine's host code and memory."""
    described = MetalTarget().tvm_target
    keys = ("max_threads_per_block", "max_shared_memory_per_block", "thread_warp_size")
    attributes = {key: int(described.attrs[key]) for key in keys}
    return tvm.target.Target({"kind": "metal", **attributes, "target_device_type": 1}, host="llvm")


def _text(source):
    return bytes(source).decode()


@cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="llmc-metal-shim-")


def _compile(sources):
    code = "\n".join([_PREFIX, *(source.translated() for source in sources)])
    digest = hashlib.sha256(code.encode()).hexdigest()[:16]
    path = Path(_folder().name) / f"{digest}.cc"
    path.write_text(code, encoding="utf-8")
    options = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", "-w"]
    output = path.with_suffix(".so")
    assert COMPILER is not None
    command = [COMPILER, *options, f"-I{HERE}", str(path), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return output
