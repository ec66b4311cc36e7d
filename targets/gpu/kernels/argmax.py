"""The likeliest token of a row of logits: a block for each part of a row, then one for the parts.

Logits are compared as integers in the floats' order: compilers for GPUs may take it that there is
no NaN, and a row with one has to be found.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.targets.building import argument, i64, kernel, put, registers, size_var, when
from llmc.targets.gpu.kernels.block import launch, shared, strided, sync
from llmc.targets.gpu.layout import ceildiv
from llmc.targets.gpu.parameters import SamplingParameters

Expr = Any
_INFINITY = 0x7F800000  # the bits of an infinite float32, and the key of +inf
_NAN = 0x7FFFFFFF


def argmax_parts(vocab_size: int, params: SamplingParameters) -> PrimFunc:
    """Buffers logits `[L, V]` f32, rows `[R]` i32 (of the logits), keys and ids `[R, parts]` i32.

    keys are the parts' largest logits as ordered integers, ids the first tokens that have them.
    """
    parts, threads = ceildiv(vocab_size, params.part), params.argmax_threads
    with kernel("argmax_parts") as built:
        rows = size_var("num_rows")
        logits = argument("logits", (size_var("num_logits"), vocab_size))
        wanted = argument("rows", (rows,), "int32")
        keys = argument("keys", (rows, parts), "int32")
        ids = argument("ids", (rows, parts), "int32")
        with launch((parts, rows), (threads,)) as (part, row, thread):
            source = T.Bind(T.Cast("int64", wanted[row]))
            first = T.Bind(part * i64(params.part))
            best = _Best()
            with strided(thread, params.part, threads) as place:
                column = T.Bind(first + place)
                with when(column < i64(vocab_size)):
                    best.offer(_key(logits[source, column]), T.Cast("int32", column))
            best.of_block(thread, threads)
            with when(thread == i64(0)):
                put(keys, best.key[i64(0)], row, part)
                put(ids, best.id[i64(0)], row, part)
    return built.func


def argmax_merge(vocab_size: int, params: SamplingParameters) -> PrimFunc:
    """Buffers keys and ids `[R, parts]` i32, token_ids `[R]` i32.

    The first of the tokens with the largest logit; -1 where that is no finite number.
    """
    parts, threads = ceildiv(vocab_size, params.part), params.merge_threads
    with kernel("argmax_merge") as built:
        rows = size_var("num_rows")
        keys = argument("keys", (rows, parts), "int32")
        ids = argument("ids", (rows, parts), "int32")
        token_ids = argument("token_ids", (rows,), "int32")
        with launch((rows,), (threads,)) as (row, thread):
            best = _Best()
            with strided(thread, parts, threads) as part:
                best.offer(keys[row, part], ids[row, part])
            best.of_block(thread, threads)
            with when(thread == i64(0)):
                key = T.Bind(best.key[i64(0)])
                finite = T.And(key > T.int32(-_INFINITY), key < T.int32(_INFINITY))
                put(token_ids, T.Select(finite, best.id[i64(0)], T.int32(-1)), row)
    return built.func


def _key(value: Expr) -> Expr:
    """An int32 in the order of the floats: both zeros are 0, NaN is above all."""
    bits = T.Bind(T.reinterpret("int32", value))
    size = T.Bind(T.bitwise_and(bits, T.int32(_NAN)))
    signed = T.Select(bits < T.int32(0), -size, size)
    return T.Select(size > T.int32(_INFINITY), T.int32(_NAN), signed)


class _Best:
    """A thread's largest key so far and the lowest id that has it."""

    def __init__(self) -> None:
        self.key, self.id = registers((1,), "int32"), registers((1,), "int32")
        put(self.key, T.int32(-_NAN), 0)
        put(self.id, T.int32(_NAN), 0)

    def offer(self, key: Expr, token_id: Expr) -> None:
        """Takes what is better."""
        key, token_id = T.Bind(key), T.Bind(token_id)
        own, zero = self.key, i64(0)
        same = T.And(key == own[zero], token_id < self.id[zero])
        with when(T.Or(key > own[zero], same)):
            put(own, key, 0)
            put(self.id, token_id, 0)

    def of_block(self, thread: Expr, threads: int) -> None:
        """Makes thread 0's the block's; all threads have to come here."""
        groups = 8
        assert threads % groups == 0, threads
        every = shared((threads,), "int32"), shared((threads,), "int32")
        some = shared((groups,), "int32"), shared((groups,), "int32")
        self._put(every, thread)
        sync()
        with when(thread < i64(groups)):
            with T.serial(i64(threads // groups)) as turn:
                place = T.Bind(turn * i64(groups) + thread)
                self.offer(every[0][place], every[1][place])
            self._put(some, thread)
        sync()
        with when(thread == i64(0)), T.serial(i64(groups)) as turn:
            self.offer(some[0][turn], some[1][turn])

    def _put(self, places: tuple[Expr, Expr], index: Expr) -> None:
        put(places[0], self.key[i64(0)], index)
        put(places[1], self.id[i64(0)], index)
