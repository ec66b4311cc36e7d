"""The loops that measure what one instruction can do: they really multiply and add."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tvm

from llmc.cli.peaks import (
    build_loop,
    build_tile_loop,
    known_instructions,
    known_tile_instructions,
)
from llmc.targets.cpu.kernels.peak import INSTRUCTIONS, TILE_CHAINS

DTYPES = {"int8": np.int8, "bf16": ml_dtypes.bfloat16, "f32": np.float32}


@pytest.mark.parametrize("instruction", known_instructions(), ids=lambda i: i.intrinsic)
def test_every_turn_adds_every_product(instruction) -> None:
    turns, tasks = 5, 3
    dtype, count = DTYPES[instruction.precision], instruction.lanes * instruction.factors
    # Small whole numbers, exact in every type; not negative, because some factors are unsigned.
    a, b = (np.random.default_rng(i).integers(0, 8, count) for i in range(2))
    factors = np.stack([x.astype(dtype).view(np.int32) for x in (a, b)])
    sums = np.ones((tasks, instruction.chains, instruction.lanes), instruction.sum_dtype)
    argument = tvm.runtime.tensor(sums)
    build_loop(instruction, turns=turns, tasks=tasks)(tvm.runtime.tensor(factors), argument)
    products = (a * b).reshape(instruction.lanes, instruction.factors).sum(axis=1)
    expected = np.broadcast_to(1 + turns * products, sums.shape)
    np.testing.assert_array_equal(argument.numpy(), expected)


@pytest.mark.parametrize("instruction", known_tile_instructions(), ids=lambda i: i.name)
def test_every_turn_multiplies_tiles(instruction) -> None:
    turns, tasks = 5, 3
    dtype, pack = DTYPES[instruction.precision], instruction.factors // 16
    a, b = (np.random.default_rng(i).integers(0, 4, (16, 16 * pack)) for i in range(2))
    factors = np.stack([x.astype(dtype).view(np.int32) for x in (a, b)])
    sums = tvm.runtime.tensor(np.zeros((tasks, TILE_CHAINS, 16, 16), instruction.sum_dtype))
    build_tile_loop(instruction, turns=turns, tasks=tasks)(tvm.runtime.tensor(factors), sums)
    # The second factor's rows are groups of features, each with all outputs.
    matrix = b.reshape(16, 16, pack).transpose(0, 2, 1).reshape(16 * pack, 16)
    expected = np.broadcast_to(turns * (a @ matrix), sums.shape)
    np.testing.assert_array_equal(sums.numpy(), expected)


def test_every_machine_has_float32() -> None:
    assert {i.machine for i in INSTRUCTIONS if i.precision == "f32"} == {"x86_64", "aarch64"}
    assert "f32" in {i.precision for i in known_instructions()}
