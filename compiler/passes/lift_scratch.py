"""What a kernel allocates becomes an argument, so that memory planning sees it.

    kernel(x, out): s = alloc(rows, 64); …     kernel(x, out, s): …
    kernel(x, y)                               s = alloc_tensor(T, 64); kernel(x, y, s)

It then lies where other tensors of the step lie at other times; TVM's pool of workspaces, which it
would come from, keeps it from then on beside the step's own memory. Equal scratch in two branches,
of which a call takes one, is one argument. Left alone is what each task of a parallel loop has to
itself, what TVM puts on the stack, and what depends on more than the arguments' shapes.

Stands between `CallTIRRewrite`, which makes the calls, and memory planning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, sym, tirx
from tvm_ffi import structural_equal, structural_map, structural_visit
from tvm_ffi.structural import StructuralVisitor

from llmc.compiler.rewriter import Expr, bindings, relax_functions, with_bindings

NUM_SCRATCH = "llmc.num_scratch"  # of a kernel: how many of its last arguments are scratch
_STACK_BYTES = 1024  # tvm::runtime::kMaxStackAlloca: what is smaller lies on the stack
_OWN_LOOPS = (tirx.ForKind.PARALLEL, tirx.ForKind.THREAD_BINDING)


@dataclass(frozen=True, slots=True)
class _Lifted:
    """A kernel that takes its scratch as its last arguments, and its new variable."""

    func: tirx.PrimFunc
    variable: tvm.ir.GlobalVar
    scratch: list[Any]  # buffers


def lift_scratch(mod: tvm.IRModule) -> tvm.IRModule:
    """Rewrites the kernels of `mod` that allocate scratch, and their calls."""
    lifted = {
        name: found
        for name, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc) and (found := _lift(name, func)) is not None
    }
    functions = dict(mod.functions_items())
    for name, kernel in lifted.items():
        del functions[name]
        functions[kernel.variable] = kernel.func
    for name, func in relax_functions(mod):
        kept = [b for binding in bindings(func) for b in _with_scratch(binding, lifted)]
        functions[name] = with_bindings(func, kept)
    return tvm.IRModule(functions, attrs=mod.attrs)


def _on_stack(buffer: Any, annotations: dict[str, Any]) -> bool:  # noqa: ANN401 - a TIR buffer
    """Whether TVM's lowering for a CPU leaves an allocation on the stack."""
    if buffer.scope() != "global" or annotations.get("disable_lower_builtin"):
        return True
    if not all(isinstance(extent, tirx.IntImm) for extent in buffer.shape):
        return False
    item_bytes = int(tvm_ffi.dtype(str(buffer.dtype)).itemsize)
    return prod(map(int, buffer.shape)) * item_bytes < _STACK_BYTES


def _lift(name: tvm.ir.GlobalVar, func: tirx.PrimFunc) -> _Lifted | None:
    extents = _extents(func)
    slots: list[_Slot] = []
    moved: dict[Any, Any] = {}
    for alloc in _allocations(func):
        if all(v in extents for e in alloc.shape for v in tirx.analysis.undefined_vars(e)):
            slot = next((s for s in slots if s.takes(alloc)), None)
            if slot is None:
                dtype = str(alloc.buffer.dtype)
                made = tirx.decl_buffer(alloc.shape, dtype, f"scratch_{len(slots)}")
                slot = _Slot(made, [])
                slots.append(slot)
            slot.members.append(alloc)
            moved[alloc.buffer] = slot.buffer
    if not moved:
        return None

    def drop(alloc: tirx.AllocBuffer) -> tirx.Stmt:
        return tirx.Evaluate(0) if alloc.buffer in moved else alloc

    body = structural_map(func.body, [(tirx.AllocBuffer, drop)], order="pre")
    scratch = [slot.buffer for slot in slots]
    lifted = tirx.PrimFunc(
        [*func.params, *scratch], replaced(body, moved), func.ret_type, func.attrs
    ).with_attr(NUM_SCRATCH, len(scratch))
    variable = tvm.ir.GlobalVar(name.name_hint)
    relax.expr._update_type(variable, lifted.ty)
    return _Lifted(lifted, variable, scratch)


@dataclass(frozen=True, slots=True)
class _Allocation:
    """Scratch that a kernel allocates, its shape by the arguments' extents, where that is so."""

    buffer: Any
    shape: list[Expr]
    branches: list[tuple[tirx.IfThenElse, int]]  # that it lies in, and in which of the two


@dataclass(frozen=True, slots=True)
class _Slot:
    """Scratch that is one argument: equal ones in branches of which a call takes one."""

    buffer: Any
    members: list[_Allocation]

    def takes(self, new: _Allocation) -> bool:
        return all(
            str(new.buffer.dtype) == str(old.buffer.dtype)
            and structural_equal(new.shape, old.shape)
            and any(
                a.same_as(b) and side != other
                for (a, side), (b, other) in zip(new.branches, old.branches, strict=False)
            )
            for old in self.members
        )


def _allocations(func: tirx.PrimFunc) -> list[_Allocation]:
    """What a kernel allocates outside of what each task of a loop does."""
    values: dict[Any, Expr] = {}  # of variables that the body binds
    branches: list[tuple[tirx.IfThenElse, int]] = []
    found: list[_Allocation] = []

    def loop(node: tirx.For, visitor: StructuralVisitor) -> None:
        if node.kind not in _OWN_LOOPS:
            visitor.default_visit(node)

    def branch(node: tirx.IfThenElse, visitor: StructuralVisitor) -> None:
        for side, case in enumerate((node.then_case, node.else_case)):
            if case is not None:
                branches.append((node, side))
                visitor.visit(case)
                branches.pop()

    def bind(node: tirx.Bind, _: StructuralVisitor) -> None:
        values[node.var] = replaced(node.value, values)

    def allocate(node: tirx.AllocBuffer, _: StructuralVisitor) -> None:
        if not _on_stack(node.buffer, dict(node.annotations)):
            shape = [replaced(extent, values) for extent in node.buffer.shape]
            found.append(_Allocation(node.buffer, shape, list(branches)))

    structural_visit(
        func.body,
        [
            (tirx.For, loop),
            (tirx.IfThenElse, branch),
            (tirx.Bind, bind),
            (tirx.AllocBuffer, allocate),
        ],
    )
    return found


def _extents(func: tirx.PrimFunc) -> set[Any]:
    """The symbolic extents of a kernel's arguments that are one variable each."""
    return {
        extent
        for param in func.params
        if isinstance(param.ty, tirx.BufferType)
        for extent in param.ty.shape
        if isinstance(extent, tvm.ir.Var)
    }


def replaced(node: Any, values: dict[Any, Any]) -> Any:  # noqa: ANN401 - an expression or statement
    """`node` with values for variables."""
    return structural_map(node, [(tvm.ir.Var, lambda var: values.get(var, var))])


def _with_scratch(
    binding: relax.VarBinding, lifted: dict[tvm.ir.GlobalVar, _Lifted]
) -> Iterable[relax.VarBinding]:
    """The binding, behind those of the scratch that its call needs."""
    call = binding.value
    if not isinstance(call, relax.Call) or call.op not in lifted:
        yield binding
        return
    kernel = lifted[call.op]
    values = {
        extent: given
        for param, arg in zip(kernel.func.params, call.args, strict=False)
        for extent, given in zip(param.ty.shape, arg.ty.shape, strict=True)
        if isinstance(extent, tvm.ir.Var)
    }
    given = []
    simplify = sym.Analyzer().simplify  # of a static T the VM takes numbers only
    for buffer in kernel.scratch:
        shape = [simplify(replaced(extent, values)) for extent in buffer.shape]
        dtype = str(buffer.dtype)
        alloc = relax.op.builtin.alloc_tensor(relax.ShapeExpr(shape), dtype, 0, "global")
        alloc = relax.BlockBuilder().normalize(alloc)
        scratch = relax.Var("scratch", alloc.ty)
        given.append(scratch)
        yield relax.VarBinding(scratch, alloc)
    yield relax.VarBinding(
        binding.var, relax.Call(kernel.variable, [*call.args, *given], call.attrs, call.ty_args)
    )
