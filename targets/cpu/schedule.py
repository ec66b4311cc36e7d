"""Schedules for what no hand-written kernel covers: the PrimFuncs of LegalizeOps and FuseTIR.

Each rule takes an unscheduled function and returns a scheduled one, or None ("not mine"): an
unscheduled function is still correct on a CPU, it runs as plain serial loops. Extents may be
symbolic, except where a loop is to be vectorized.

Both rules end alike: exp, tanh, erf and sigmoid become polynomials (kernels/math.py), and an outer
loop becomes parallel where its work is worth waking threads. Where only the call knows how much
work there is, both forms are compiled and the shorter branch is chosen at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from llmc.targets.cpu.kernels import math as polynomials
from llmc.targets.cpu.kernels.vector import LANES, SERIAL_FLOATS

ROW_WORK = "llmc.row_work"  # annotation of a loop that may run in parallel: operations a turn
SPATIAL, REDUCTION = tirx.IterVar.DataPar, tirx.IterVar.CommReduce
POLYNOMIALS: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": polynomials.exp,
    "tirx.tanh": polynomials.tanh,
    "tirx.erf": polynomials.erf,
    "tirx.sigmoid": polynomials.sigmoid,
}
VECTOR_DTYPES = {"float32", "float16", "int32", "int64", "int8", "uint8"}
MIN_LANES = 4  # narrower vectors gain nothing over what LLVM finds by itself
UNKNOWN_EXTENT = 64  # what a symbolic inner axis counts as work


def schedule_elementwise(func: tirx.PrimFunc) -> tirx.PrimFunc | None:
    """Inlines producers, vectorizes the inner axis and shares the outer ones among threads.

    For functions whose blocks only map (no reduction, scan or opaque block): arithmetic, gather,
    concatenate, slice, transpose, cast and chains of them.
    """
    return _attempt(func, _elementwise)


def schedule_reduction(func: tirx.PrimFunc) -> tirx.PrimFunc | None:
    """Brings all blocks of a row together under one loop over rows, and sums in vectors.

    For functions with at least one reduction in which every block begins with the same spatial
    axes: sums, means, maxima, argmax, softmax, norms. Float32 sums change their order.
    """
    return _attempt(func, _reduction)


def _attempt(func: tirx.PrimFunc, rule: Callable[[s_tir.Schedule], bool]) -> tirx.PrimFunc | None:
    if "tirx.is_scheduled" in func.attrs:
        return None
    try:
        sch = s_tir.Schedule(func)
        if not rule(sch):
            return None
        return _finish(sch.mod["main"]).with_attr("tirx.is_scheduled", True)
    except (RuntimeError, ValueError, TypeError):
        # ScheduleError and TVM's internal errors: a primitive refuses what its analysis cannot
        # prove, so the function is not of this kind.
        return None


def _elementwise(sch: s_tir.Schedule) -> bool:
    blocks = _blocks(sch)
    if not blocks or not all(_kinds(sch, b) <= {SPATIAL} for b in blocks):
        return False
    for block in _inline_producers(sch, blocks):
        loops = sch.get_loops(block)
        if not loops:
            continue
        work = _extent(sch, loops[-1]) or UNKNOWN_EXTENT
        inner = _vectorize_inner(sch, block)
        if len(loops) > 1:
            sch.annotate(sch.fuse(*loops[:-1]), ROW_WORK, work)
        elif inner is not None:
            sch.annotate(inner, ROW_WORK, LANES)
    return True


def _reduction(sch: s_tir.Schedule) -> bool:
    blocks = _blocks(sch)
    kinds = [_kinds(sch, b) for b in blocks]
    if not any(REDUCTION in kind for kind in kinds):
        return False
    if not all(kind <= {SPATIAL, REDUCTION} for kind in kinds):
        return False
    blocks = _inline_producers(sch, blocks)
    lead = min(_leading_spatial(sch, b) for b in blocks)
    if lead == 0 or len(sch.get_output_blocks(sch.get_sblock("root"))) != 1:
        return False
    partials = [partial for block in blocks if (partial := _split_sum(sch, block)) is not None]
    *producers, last = _blocks(sch)
    loops = sch.get_loops(last)
    rows = sch.fuse(*loops[:lead])
    for block in reversed(producers):
        sch.compute_at(block, rows, preserve_unit_loops=True)
    work = 0
    for block in sch.get_child_blocks(rows):
        inner = sch.get_loops(block)[1:]
        work += math.prod(_extent(sch, loop) or UNKNOWN_EXTENT for loop in inner)
        if inner and _kinds(sch, block) == {SPATIAL}:
            _vectorize_inner(sch, block)
    for partial in partials:
        # compute_at put the lanes first and the reduction last: the vector belongs inside.
        _, lane, *_, reduced = sch.get_loops(partial)
        sch.reorder(reduced, lane)
        sch.vectorize(lane)
    sch.annotate(rows, ROW_WORK, work)
    return True


def _blocks(sch: s_tir.Schedule) -> list[s_tir.schedule.SBlockRV]:
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def _kinds(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV) -> set[int]:
    return {int(v.iter_type) for v in sch.get(block).iter_vars}


def _leading_spatial(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV) -> int:
    """Number of spatial axes before the first reduction axis."""
    kinds = [int(v.iter_type) for v in sch.get(block).iter_vars]
    return kinds.index(REDUCTION) if REDUCTION in kinds else len(kinds)


def _extent(sch: s_tir.Schedule, loop: s_tir.schedule.LoopRV) -> int | None:
    extent = sch.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None


def _inline_producers(
    sch: s_tir.Schedule, blocks: list[s_tir.schedule.SBlockRV]
) -> list[s_tir.schedule.SBlockRV]:
    """Inlines the maps that have one reader; returns the blocks that are left."""
    left = []
    for block in blocks:
        if _kinds(sch, block) == {SPATIAL} and len(sch.get_consumers(block)) == 1:
            try:
                sch.compute_inline(block)
                continue
            except s_tir.ScheduleError:
                pass  # an output, or written in parts: it stays a block of its own
        left.append(block)
    return left


def _vectorize_inner(
    sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV
) -> s_tir.schedule.LoopRV | None:
    """Vectorizes a block's last loop by a divisor of its extent; returns the loop around."""
    inner = sch.get_loops(block)[-1]
    extent = _extent(sch, inner)
    lanes = math.gcd(extent, LANES) if extent else 1
    statement = sch.get(block)
    dtypes = {str(r.source.dtype) for r in [*statement.reads, *statement.writes]}
    if lanes < MIN_LANES or not dtypes <= VECTOR_DTYPES:
        return None
    outer, vector = sch.split(inner, factors=[None, lanes])
    sch.vectorize(vector)
    return outer


def _split_sum(
    sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV
) -> s_tir.schedule.SBlockRV | None:
    """Splits a reduction over a long last axis in two: of 16 lanes, then of one vector.

    Returns the block that reduces by lanes, or None where that does not pay.
    """
    statement = sch.get(block)
    loops = sch.get_loops(block)
    extent = _extent(sch, loops[-1])
    if _leading_spatial(sch, block) != len(loops) - 1 or len(statement.writes) != 1:
        return None
    if extent is None or extent % LANES or extent < 2 * LANES:
        return None
    # A product's second operand is strided: vectors of it would be gathered.
    if len({r.source.name for r in statement.reads}) != 1:
        return None
    _, lane = sch.split(loops[-1], factors=[None, LANES])
    return sch.rfactor(lane, len(loops) - 1)


def _finish(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Polynomials for libm's functions, and threads for the loops that deserve them."""
    # Rows get buffers of their own before their loop is doubled: afterwards both would share one.
    module = s_tir.transform.LowerInitBlock()(tvm.IRModule({"main": func}))
    func = s_tir.transform.PlanAndUpdateBufferAllocationLocation()(module)["main"]
    body = tvm_ffi.structural.structural_map(
        func.body, [(tvm.ir.Call, _polynomial), (tirx.For, _parallel)]
    )
    module = tvm.IRModule({"main": func.with_body(body)})
    return s_tir.transform.ConvertSSA()(module)["main"]


def _polynomial(call: Any) -> Any:  # noqa: ANN401 - an IR node of any kind
    op = call.op
    if isinstance(op, tvm.ir.Op) and op.name in POLYNOMIALS and str(call.ty.dtype) == "float32":
        return POLYNOMIALS[op.name](call.args[0])
    return call


def _parallel(loop: Any) -> Any:  # noqa: ANN401
    """A loop with ROW_WORK as a serial loop, a parallel one, or a test that chooses."""
    if ROW_WORK not in loop.annotations:
        return loop
    work = int(loop.annotations[ROW_WORK])
    serial = _with_kind(loop, tirx.ForKind.SERIAL)
    if isinstance(loop.extent, tirx.IntImm):
        is_short = int(loop.extent) * work <= SERIAL_FLOATS
        return serial if is_short else _with_kind(loop, tirx.ForKind.PARALLEL)
    threshold = tirx.const(max(1, SERIAL_FLOATS // work), loop.extent.ty.dtype)
    parallel = _with_kind(_with_own_buffers(loop), tirx.ForKind.PARALLEL)
    return tirx.IfThenElse(loop.extent <= threshold, serial, parallel)


def _with_kind(loop: Any, kind: Any) -> Any:  # noqa: ANN401
    return tirx.For(loop.loop_var, loop.min, loop.extent, kind, loop.body)


def _with_own_buffers(loop: Any) -> Any:  # noqa: ANN401
    """The loop with new buffers for those allocated in it: a buffer has one definition."""
    renamed: dict[Any, Any] = {}

    def rename(block: Any) -> None:  # noqa: ANN401
        for buffer in block.alloc_buffers:
            renamed[buffer] = tirx.decl_buffer(
                buffer.ty.shape, buffer.ty.dtype, buffer.name, scope=buffer.scope()
            )

    tvm_ffi.structural.structural_walk(loop, (s_tir.SBlock, rename))
    return tvm_ffi.structural.structural_map(loop, (tvm.ir.Var, lambda v: renamed.get(v, v)))
