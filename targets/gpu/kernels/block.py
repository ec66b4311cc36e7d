"""A thread block: launching it, its memory, its barriers and its reductions.

Everything here runs while an IRBuilder frame is open: Python loops become straight code, `T.serial`
a loop. Indices are int64, so that no weight or cache is too large; code generators narrow them
where they can prove that 32 bits do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.targets.building import Extent, f32, i64, index, put, registers, size_var, when
from llmc.targets.gpu.parameters import Features

Expr = Any
LOWEST = -3.0e38
"""Below every score, and finite: LOWEST - LOWEST is 0, not NaN."""


def rows_of(tokens: int | None) -> Expr:
    """T: fixed, or a symbolic dimension."""
    return size_var("num_tokens") if tokens is None else i64(tokens)


def shared(shape: tuple[int, ...], dtype: str = "float32") -> Expr:
    """Memory of the block."""
    return T.alloc_buffer([i64(d) for d in shape], dtype, scope="shared")


def workspace(shape: tuple[Extent, ...], dtype: str = "float32") -> Expr:
    """Device memory that one launch of the function leaves to the next."""
    return T.alloc_buffer([index(d) for d in shape], dtype, scope="global")


def sync() -> None:
    """Waits for the block's threads; what they wrote to shared memory is seen after it."""
    T.evaluate(T.tvm_storage_sync("shared"))


@contextmanager
def launch(
    blocks: tuple[Extent, ...], threads: tuple[int, ...], *, cluster: int = 1
) -> Iterator[tuple[Expr, ...]]:
    """Blocks (x, y, z) of threads (x, y); yields their indices, all int64, blocks first.

    `cluster` blocks that follow each other in x run at the same time and share memory (CUDA).
    """
    groups = [T.launch_thread("clusterCtaIdx.x", i64(cluster))] if cluster > 1 else []
    frames = [T.launch_thread(f"blockIdx.{a}", index(n)) for a, n in zip("xyz", blocks)]
    frames += [T.launch_thread(f"threadIdx.{a}", i64(n)) for a, n in zip("xy", threads)]
    opened: list[Expr] = []
    every = [*groups, *frames]
    try:
        for frame in every:
            opened.append(frame.__enter__())
        yield tuple(opened[len(groups) :])
    finally:
        for frame in reversed(every[: len(opened)]):
            frame.__exit__(None, None, None)


def quotient(a: Expr, b: int) -> Expr:
    """a // b of a number that is not negative, whatever TVM knows of it.

    For floordiv of a number that it knows nothing of, TVM adds 2^31 and some before it divides: a
    generator that narrows indices to 32 bits would overflow. By powers of two it shifts.
    """
    return T.floordiv(a, i64(b)) if b & (b - 1) == 0 else T.truncdiv(a, i64(b))


def remainder(a: Expr, b: int) -> Expr:
    """a % b of a number that is not negative; see `quotient`."""
    return T.floormod(a, i64(b)) if b & (b - 1) == 0 else T.truncmod(a, i64(b))


def quotient_up(a: Expr, b: int) -> Expr:
    """The quotient rounded up; see `quotient`."""
    return quotient(a + i64(b - 1), b)


@contextmanager
def when_all(condition: Expr) -> Iterator[None]:
    """Only where the condition holds, which has to be the same for the whole block.

    The body may hold barriers. It is a loop of one turn or none, because TVM takes every condition
    for one that threads differ in.
    """
    with T.serial(T.Select(condition, i64(1), i64(0))):
        yield


@contextmanager
def strided(start: Expr, extent: Extent, step: int) -> Iterator[Expr]:
    """start, start + step, … below `extent`, which may be symbolic; the body holds no barrier."""
    if isinstance(extent, int) and extent % step == 0:
        with T.serial(i64(extent // step)) as i:
            yield T.Bind(i * i64(step) + start)
        return
    with T.serial(quotient_up(index(extent), step)) as i:
        element = T.Bind(i * i64(step) + start)
        with when(element < index(extent)):
            yield element


def read_vector(buffer: Expr, at: tuple[Expr, ...], lanes: int) -> list[Expr]:
    """`lanes` neighbouring float32 by one access; `at` is the first's place, a multiple of it."""
    if lanes == 1:
        return [T.Bind(buffer[at])]
    values = registers((lanes,))
    whole = T.ramp(i64(0), i64(1), lanes)
    T.buffer_store(values, buffer[(*at[:-1], T.ramp(at[-1], i64(1), lanes))], [whole])
    return [T.Bind(values[i64(lane)]) for lane in range(lanes)]


def write_vector(buffer: Expr, at: tuple[Expr, ...], values: list[Expr]) -> None:
    """Stores neighbouring float32 by one access, where `read_vector` may read them."""
    lanes = len(values)
    if lanes == 1:
        T.buffer_store(buffer, values[0], list(at))
        return
    vector = registers((lanes,))
    for lane, value in enumerate(values):
        put(vector, value, lane)
    whole = vector[T.ramp(i64(0), i64(1), lanes)]
    T.buffer_store(buffer, whole, [*at[:-1], T.ramp(at[-1], i64(1), lanes)])


def add(a: Expr, b: Expr) -> Expr:
    """The sum, for `reduce`."""
    return a + b


def maximum(a: Expr, b: Expr) -> Expr:
    """The larger, for `reduce`."""
    return T.max(a, b)


Combine = Callable[[Expr, Expr], Expr]


def reduce(value: Expr, combine: Combine, thread: Expr, threads: int, features: Features) -> Expr:
    """`value` of all threads combined, known to each; all threads of the block have to come here.

    The order of the additions depends on nothing but `threads` and the subgroup's width.
    """
    [result] = reduce_all([value], combine, thread, threads, features)
    return result


def reduce_all(
    values: list[Expr], combine: Combine, thread: Expr, threads: int, features: Features
) -> list[Expr]:
    """`reduce` of several values behind the same barriers."""
    count = len(values)
    width = features.subgroup if threads % features.subgroup == 0 else 1
    if width > 1:
        whole = registers((count,))
        for number, value in enumerate(values):
            # Stored, not bound: TVM would move a bound value under the condition below, where most
            # of the subgroup is missing.
            put(whole, features.combine_subgroup(value, combine is maximum), number)
        values = [T.Bind(whole[i64(number)]) for number in range(count)]
        if threads == width:
            return values
        parts = threads // width
        partial = shared((count, parts))
        with when(T.floormod(thread, i64(width)) == i64(0)):
            for number, value in enumerate(values):
                put(partial, value, number, T.floordiv(thread, i64(width)))
    else:
        # Two rounds of about the square root of all threads need two barriers, a tree log2.
        parts = _near_root(threads)
        every = shared((count, threads))
        partial = shared((count, parts))
        for number, value in enumerate(values):
            put(every, value, number, thread)
        sync()
        with when(thread < i64(parts)):
            for number in range(count):
                folded = _fold(every, number, combine, thread, threads // parts, parts)
                put(partial, folded, number, thread)
    sync()
    # In a loop the memory is written again: TVM puts the barrier that this needs.
    return [T.Bind(_fold(partial, n, combine, i64(0), parts, 1)) for n in range(count)]


def _near_root(threads: int) -> int:
    """The divisor of `threads` that is nearest to its square root from below."""
    return max(d for d in range(1, math.isqrt(threads) + 1) if threads % d == 0)


def _fold(buffer: Expr, number: int, combine: Combine, first: Expr, count: int, step: int) -> Expr:
    value = buffer[i64(number), first]
    for i in range(1, count):
        value = combine(value, buffer[i64(number), first + i64(i * step)])
    return value
