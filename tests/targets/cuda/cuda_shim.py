"""CUDA C++ of the kernels as g++ compiles it, on a CPU: fibers for threads, and what is written in
PTX replaced by its definition (g++ refuses what is left). The rest is the source that nvcc gets.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llmc.targets.cuda.kernels.source import source

needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="apt-get install g++")
_DOT = """
  for (int i = 0; i < 4; ++i) {
    const u32 code = codes >> 8 * i & 255, byte = x >> 8 * i & 255;
    sum += (kSigned ? (int)(signed char)code : (int)code) * (int)(signed char)byte;
  }
"""
_MMA = """
  multiply_tile(d, {{a0, a1, a2, a3}}, {{b0, b1}},
                [](u32 bits) {{ return unpack(bits, {kind}()); }});
}}
"""


def build(names, code, folder):
    """The library of `code` behind the sources of these names."""
    text = "".join(source(name) for name in names)
    text = re.sub(
        r"(int dot\(.*?\{\n).*?(  return sum;)",
        lambda m: m[1] + _DOT + m[2],
        text,
        flags=re.DOTALL,
    )
    text = re.sub(
        r"(void mma\([^{]*?(half|__nv_bfloat16)\) \{\n).*?\n\}\n",
        lambda m: m[1] + _MMA.format(kind=m[2]),
        text,
        flags=re.DOTALL,
    )
    text = re.sub(r'asm\("ex2.approx.ftz.f32 .*?\);', "y = exp2f(x);", text)
    text = re.sub(r'asm volatile\("prefetch\..*?\);', ";", text)  # changes nothing but time
    (folder / "kernels.cc").write_text(text + code)
    options = [
        "-std=c++17",
        "-O1",
        "-fno-strict-aliasing",
        "-fno-gnu-unique",
        "-fPIC",
        "-shared",
        "-w",
    ]
    command = ["g++", *options, f"-I{Path(__file__).parent / 'shim'}", "kernels.cc"]
    done = subprocess.run(
        [*command, "-o", "kernels.so"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(folder / "kernels.so"))
