"""Memory that kernels take from TVM's pool of workspaces, of which every thread has its own."""

from __future__ import annotations

from typing import Any

import tvm
from tvm_ffi import structural_visit
from tvm_ffi.structural import StructuralVisitor

from llmc.errors import CompileError

_LOWERING = "tirx.LowerTVMBuiltin"  # makes calls of what kernels allocate
_ALLOC = "tirx.TVMBackendAllocWorkspace"  # (device type, device, bytes, type code, bits)
_FREE = "tirx.TVMBackendFreeWorkspace"
_PAGE_BYTES = 4096  # what the pool rounds up to


@tvm.instrument.pass_instrument
class ScratchMeter:
    """Watches a code generation, and knows afterwards what its kernels allocate."""

    def __init__(self) -> None:
        self._lowered: tvm.IRModule | None = None

    def run_after_pass(self, mod: tvm.IRModule, info: Any) -> None:  # noqa: ANN401
        """Called by TVM."""
        if info.name == _LOWERING:
            self._lowered = mod

    def bytes_per_thread(self) -> int:
        """What the pool of a thread that has run all kernels holds at most.

        It keeps its blocks. It makes one more only when all are in use, and a larger one (in the
        place of the largest free one) only when all larger ones are: so its i-th largest block is
        no larger than what some kernel asks for while it holds i - 1 others.
        """
        assert self._lowered is not None, "code was generated"
        largest: list[int] = []
        for name, func in self._lowered.functions_items():
            for held, size in _requests(func):
                if not isinstance(size, tvm.tirx.IntImm):
                    raise CompileError(
                        f"nothing bounds the scratch of kernel {name.name_hint}: {size} bytes"
                    )
                num_bytes = -(-int(size) // _PAGE_BYTES) * _PAGE_BYTES
                largest += [0] * (held + 1 - len(largest))
                largest[: held + 1] = [max(known, num_bytes) for known in largest[: held + 1]]
        return sum(largest)


def _requests(func: tvm.tirx.PrimFunc) -> list[tuple[int, Any]]:
    """What a lowered function asks the pool for: how many it holds by then, and the bytes."""
    found: list[tuple[int, Any]] = []
    held = 0  # a scope frees at its end what it allocates: the order of the code is that of calls

    def call(node: tvm.ir.Call, visitor: StructuralVisitor) -> None:
        nonlocal held
        op = node.op.name if isinstance(node.op, tvm.ir.Op) else None
        if op == _ALLOC:
            found.append((held, node.args[2]))
            held += 1
        elif op == _FREE:
            held -= 1
        visitor.default_visit(node)

    structural_visit(func.body, [(tvm.ir.Call, call)])
    assert held == 0, "every scope frees what it allocates"
    return found
