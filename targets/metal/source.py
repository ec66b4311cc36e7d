"""What kernels in Metal's language have to keep to, checked where they are printed.

TVM's runtime has macOS compile them as Metal 2.3, when a kernel is first used: what is wrong with
one would be found by a user, on a Mac, and no compiler for it runs elsewhere.
"""

from __future__ import annotations

import re

from llmc.errors import CompileError

MAX_THREADS = 1024
"""Of a threadgroup."""
THREADGROUP_BYTES = 32768
"""Memory of a threadgroup, on every GPU of Apple's."""

_BYTES = {"bool": 1, "char": 1, "uchar": 1, "short": 2, "ushort": 2, "half": 2}
_BYTES |= {"int": 4, "uint": 4, "float": 4, "long": 8, "ulong": 8}
# bfloat came with Metal 3.1.
_UNKNOWN = re.compile(
    r"\b(?:double|bfloat)[234]?\b|\b(?:char|uchar|short|half|int|float)(?:8|16)\b"
)
_THREADGROUP = re.compile(r"^ *threadgroup ([a-z]+)([234]?) \w+\[(\d+)\];$", re.MULTILINE)
_NAME = re.compile(r"kernel void (\w+)\(")


def check_source(source: str) -> str:
    """The source of one kernel, as it came; raises CompileError where no Mac would take it."""
    unknown = _UNKNOWN.search(source)
    if unknown:
        raise CompileError(
            f"kernel {_name(source)} uses {unknown[0]}, which Metal 2.3 does not have",
            hint="compile with another type of activations, weights or KV cache",
        )
    used = threadgroup_bytes(source)
    if used > THREADGROUP_BYTES:
        raise CompileError(
            f"kernel {_name(source)} needs {used} bytes of threadgroup memory, "
            f"a GPU of Apple's has {THREADGROUP_BYTES}"
        )
    return source


def threadgroup_bytes(source: str) -> int:
    """Memory that a threadgroup of the kernel takes; every array is aligned to 16 bytes."""
    total = 0
    for kind, lanes, count in _THREADGROUP.findall(source):
        total += -(-_BYTES[kind] * int(lanes or 1) * int(count) // 16) * 16
    return total


def _name(source: str) -> str:
    found = _NAME.search(source)
    return found[1] if found else "?"
