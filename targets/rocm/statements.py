"""What the build asks of a lowered kernel's statements, and what it changes in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import tvm
from tvm import tirx

from llmc.errors import CompileError

MAX_THREADS = 1024  # of a block, on every architecture
BARRIER = "llmc_barrier"  # of device_functions.ll


def block_threads(func: tirx.PrimFunc) -> int:
    """Threads of a block, which have to be known when code is made; raises CompileError."""
    extents: dict[str, int] = {}
    for stmt in _each(func.body):
        if not isinstance(stmt, tirx.AttrStmt) or str(stmt.attr_key) != "thread_extent":
            continue
        tag = str(stmt.node.thread_tag)
        if tag.startswith("threadIdx."):
            if not isinstance(stmt.value, tirx.IntImm):
                raise CompileError(f"a block of {stmt.value} threads, which is no constant")
            extents[tag] = int(stmt.value)
    threads = math.prod(extents.values())
    if threads > MAX_THREADS:
        raise CompileError(f"a block of {threads} threads, more than {MAX_THREADS}")
    return threads


def with_barriers(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """With barriers that wait for what was stored before them (see device_functions.ll)."""

    def replace(stmt: tirx.Stmt) -> tirx.Stmt:
        if isinstance(stmt, tirx.Evaluate) and _is_barrier(stmt.value):
            return tirx.Evaluate(tirx.call_extern("void", BARRIER))
        return stmt

    return func.with_body(_rebuild(func.body, replace))


def _is_barrier(value: object) -> bool:
    if not isinstance(value, tvm.ir.Call) or str(value.op.name) != "tirx.tvm_storage_sync":
        return False
    return str(value.args[0].value) == "shared"


def _each(stmt: tirx.Stmt) -> Iterator[tirx.Stmt]:
    """Every statement, outer ones first."""
    yield stmt
    if isinstance(stmt, tirx.SeqStmt):
        for inner in stmt.seq:
            yield from _each(inner)
    elif isinstance(stmt, tirx.IfThenElse):
        yield from _each(stmt.then_case)
        if stmt.else_case is not None:
            yield from _each(stmt.else_case)
    elif isinstance(stmt, tirx.AttrStmt | tirx.For | tirx.While):
        yield from _each(stmt.body)


def _rebuild(stmt: tirx.Stmt, replace: Callable[[tirx.Stmt], tirx.Stmt]) -> tirx.Stmt:
    """The statement with every innermost one replaced by what `replace` makes of it."""
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([_rebuild(inner, replace) for inner in stmt.seq])
    if isinstance(stmt, tirx.IfThenElse):
        other = None if stmt.else_case is None else _rebuild(stmt.else_case, replace)
        return tirx.IfThenElse(stmt.condition, _rebuild(stmt.then_case, replace), other)
    if isinstance(stmt, tirx.AttrStmt):
        body = _rebuild(stmt.body, replace)
        return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, body)
    if isinstance(stmt, tirx.While):
        return tirx.While(stmt.condition, _rebuild(stmt.body, replace))
    if isinstance(stmt, tirx.For):
        return tirx.For(
            stmt.loop_var,
            stmt.min,
            stmt.extent,
            stmt.kind,
            _rebuild(stmt.body, replace),
            stmt.thread_binding,
            stmt.annotations,
            stmt.step,
        )
    return replace(stmt)
