"""What this machine lacks to build and to run CPU artifacts: nothing, but for a TVM without it."""

from __future__ import annotations

import tvm

from llmc.targets.status import Lack

_HINT = "pip install --force-reinstall apache-tvm"


def lacks() -> list[Lack]:
    """Parts that TVM's wheels have."""
    found: list[Lack] = []
    if tvm.get_global_func("target.build.llvm", allow_missing=True) is None:
        found.append(Lack(reason="this TVM has no target.build.llvm", hint=_HINT, run=False))
    if not tvm.device("cpu").exist:
        found.append(Lack(reason="this TVM has no CPU device", hint=_HINT, build=False))
    return found
