"""Memory that kernels take from TVM's pool of workspaces, of which every thread has its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm_ffi import structural_visit
from tvm_ffi.structural import StructuralVisitor

from llmc.compiler.passes.lift_scratch import replaced
from llmc.compiler.passes.plan_memory import bounds_of, upper_bound
from llmc.compiler.rewriter import Expr, bindings, relax_functions
from llmc.errors import CompileError

_LOWERING = "tirx.LowerTVMBuiltin"  # makes calls of what kernels allocate
_ALLOC = "tirx.TVMBackendAllocWorkspace"  # (device type, device, bytes, type code, bits)
_FREE = "tirx.TVMBackendFreeWorkspace"
_PAGE_BYTES = 4096  # what the pool rounds up to


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadScratch:
    """What the pools hold at most once all kernels have run, in bytes."""

    each_thread: int  # for tasks of parallel loops
    caller: int  # besides, on the thread that calls the kernels


@tvm.instrument.pass_instrument
class ScratchMeter:
    """Watches a code generation, and knows afterwards what its kernels allocate."""

    def __init__(self) -> None:
        self._lowered: tvm.IRModule | None = None

    def run_after_pass(self, mod: tvm.IRModule, info: Any) -> None:  # noqa: ANN401
        """Called by TVM."""
        if info.name == _LOWERING:
            self._lowered = mod

    def measured(self, planned: tvm.IRModule) -> ThreadScratch:
        """`planned` has the calls of the kernels, whose extents it bounds.

        CompileError where nothing bounds what a kernel allocates.
        """
        assert self._lowered is not None, "code was generated"
        bounds = _kernel_bounds(planned)
        nothing: dict[str, int] = {}
        tasks, all_threads = _Pool(), _Pool()
        for name, func in self._lowered.functions_items():
            for request in _requests(func):
                num_bytes = request.bounded(bounds.get(name.name_hint, nothing))
                if num_bytes is None:
                    raise CompileError(
                        f"nothing bounds the scratch of kernel {name.name_hint}: "
                        f"{request.size} bytes"
                    )
                all_threads.allow(request.held, num_bytes)
                if request.held_by_task is not None:
                    tasks.allow(request.held_by_task, num_bytes)
        each = tasks.num_bytes
        return ThreadScratch(each_thread=each, caller=all_threads.num_bytes - each)


class _Pool:
    """A pool that has served any sequence of kernels.

    It keeps its blocks. It makes one more only when all are in use, and a larger one (in the place
    of the largest free one) only when all larger ones are: so its i-th largest block is no larger
    than what some kernel asks for while it holds i - 1 others.
    """

    def __init__(self) -> None:
        self._largest: list[int] = []  # of what is asked for while i others, or more, are held

    def allow(self, held: int, num_bytes: int) -> None:
        """A kernel asks for so much while it holds `held` blocks."""
        pages = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self._largest += [0] * (held + 1 - len(self._largest))
        for i in range(held + 1):
            self._largest[i] = max(self._largest[i], pages)

    @property
    def num_bytes(self) -> int:
        return sum(self._largest)


def _kernel_bounds(planned: tvm.IRModule) -> dict[str, dict[str, int]]:
    """The upper bounds of each kernel's symbolic extents over all its calls, by their names.

    Kernels that TVM made have the extents of the functions that call them, by the same names.
    """
    found: dict[str, dict[str, int]] = {}
    for _, func in relax_functions(planned):
        own = bounds_of(func)
        for binding in bindings(func):
            called = _called(binding.value)
            if called is None:
                continue
            name, args = called
            known = found.setdefault(name.name_hint, {})
            extents = dict(own)
            for param, arg in zip(planned[name].params, args, strict=False):
                if isinstance(param.ty, tirx.BufferType) and isinstance(arg.ty, relax.TensorType):
                    for extent, given in zip(param.ty.shape, arg.ty.shape, strict=True):
                        bound = upper_bound(given, own)
                        if isinstance(extent, tvm.ir.Var) and bound is not None:
                            extents[extent.name] = bound
            for extent_name, bound in extents.items():
                known[extent_name] = max(bound, known.get(extent_name, 0))
    return found


def _called(value: Expr) -> tuple[tvm.ir.GlobalVar, list[Expr]] | None:
    """The kernel that a binding calls, and the arguments; directly, or with numbers besides."""
    if not isinstance(value, relax.Call):
        return None
    if isinstance(value.op, tvm.ir.GlobalVar):
        return value.op, list(value.args)
    if value.args and isinstance(value.args[0], tvm.ir.GlobalVar):
        return value.args[0], list(value.args[1:])
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """One allocation of a kernel."""

    size: Expr  # in bytes
    values: dict[Any, Expr]  # of the variables that the kernel binds
    held: int  # blocks that the kernel's caller holds by then
    held_by_task: int | None  # those of the parallel loop's task that it is in

    def bounded(self, bounds: Mapping[str, int]) -> int | None:
        """The most bytes where the kernel's extents have these bounds; None without bounds."""
        size = self.size
        while True:
            free = [v for v in tirx.analysis.undefined_vars(size) if v.name not in bounds]
            known = {v: self.values[v] for v in free if v in self.values}
            if not known:
                return upper_bound(size, bounds)
            size = replaced(size, known)


def _requests(func: tirx.PrimFunc) -> list[_Request]:
    """What a lowered function asks the pool for."""
    found: list[_Request] = []
    values: dict[Any, Expr] = {}
    held = 0  # a scope frees at its end what it allocates: the order of the code is that of calls
    before_task: int | None = None

    def call(node: tvm.ir.Call, visitor: StructuralVisitor) -> None:
        nonlocal held
        op = node.op.name if isinstance(node.op, tvm.ir.Op) else None
        if op == _ALLOC:
            by_task = None if before_task is None else held - before_task
            found.append(
                _Request(size=node.args[2], values=values, held=held, held_by_task=by_task)
            )
            held += 1
        elif op == _FREE:
            held -= 1
        visitor.default_visit(node)

    def loop(node: tirx.For, visitor: StructuralVisitor) -> None:
        nonlocal before_task
        outside = before_task
        if node.kind == tirx.ForKind.PARALLEL:
            before_task = held
        visitor.default_visit(node)
        before_task = outside

    def bind(node: tirx.Bind, visitor: StructuralVisitor) -> None:
        values[node.var] = node.value
        visitor.default_visit(node)

    structural_visit(func.body, [(tvm.ir.Call, call), (tirx.For, loop), (tirx.Bind, bind)])
    assert held == 0, "every scope frees what it allocates"
    return found
