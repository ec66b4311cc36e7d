"""How tiles of the same panels share out what they ask memory for meanwhile."""

from __future__ import annotations

import numpy as np
from matrices import build, tensor
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from llmc.targets.building import argument, i64, size_var
from llmc.targets.cpu.kernels.register_tiles import Next, Turn

STEPS = 64
LARGEST = 8


def _shares():
    """rows `[count]`, for its shape; y `[size - 1, first, step]`: the step asked for in each."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("shares")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        count = size_var("count")
        argument("rows", (count,))
        y = argument("y", (LARGEST, count, STEPS), "int64")
        for size in range(1, LARGEST + 1):
            with T.serial(count) as first:
                turn = Turn.of(first, size, count, Next(i64(0), i64(0)))
                with T.serial(i64(STEPS)) as step:
                    share = turn.share(step, STEPS)
                    T.buffer_store(y, share, [i64(size - 1), first, step])
    return builder.get()


def test_all_steps_of_the_next_panels_are_asked_for_once_in_turn():
    module = build({"shares": _shares()})
    for tiles in ([8], [3], [6, 2], [8, 8], [8, 4, 3], [8, 6, 1], [6] * 31 + [4, 2]):
        count = sum(tiles)
        y = tensor(np.full((LARGEST, count, STEPS), -1, np.int64))
        module["shares"](tensor(np.zeros(count, np.float32)), y)
        firsts = np.cumsum([0, *tiles[:-1]])
        asked = np.concatenate(
            [y.numpy()[size - 1, at] for size, at in zip(tiles, firsts, strict=True)]
        )
        assert asked.min() == 0
        assert asked.max() < STEPS
        assert (np.diff(asked) >= 0).all()
        # A fraction is rounded down, so the last steps may be left out, and left to the processor.
        assert len(np.setdiff1d(np.arange(STEPS), asked)) <= STEPS // 16


CHUNKS, PANELS = 3, 2


def _what_follows():
    """rows `[count]`, for its shape; y `[chunk, 2 + step]`: panels, the next chunk, and the step of
    a row that is asked for in each step of a chunk by the only tile.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("follows")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        count = size_var("count")
        argument("rows", (count,))
        y = argument("y", (CHUNKS, 2 + STEPS), "int64")
        with T.serial(i64(CHUNKS)) as chunk:
            then = Next.after(chunk, CHUNKS, PANELS)
            T.buffer_store(y, then.panels, [chunk, i64(0)])
            T.buffer_store(y, then.chunk, [chunk, i64(1)])
            turn = Turn.of(i64(0), LARGEST, count, then)
            with T.serial(i64(STEPS)) as step:
                T.buffer_store(y, turn.share(step, STEPS), [chunk, step + i64(2)])
    return builder.get()


def test_behind_a_chunk_comes_the_next_one_or_the_first_of_the_panels_that_follow():
    module = build({"follows": _what_follows()})
    y = tensor(np.full((CHUNKS, 2 + STEPS), -1, np.int64))
    module["follows"](tensor(np.zeros(LARGEST, np.float32)), y)
    for chunk, (panels, following, *shares) in enumerate(y.numpy().tolist()):
        is_last = chunk == CHUNKS - 1
        assert panels == (PANELS if is_last else 0)
        assert following == (0 if is_last else chunk + 1)
        assert shares == [following * STEPS + step for step in range(STEPS)]
