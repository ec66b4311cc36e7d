"""The loops that measure what one instruction can do: they really multiply and add."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tvm

from llmc.cli.peaks import build_loop, known_instructions
from llmc.targets.cpu.kernels.peak import CHAINS, INSTRUCTIONS

DTYPES = {"int8": np.int8, "bf16": ml_dtypes.bfloat16, "f32": np.float32}


@pytest.mark.parametrize("instruction", known_instructions(), ids=lambda i: i.intrinsic)
def test_every_turn_adds_every_product(instruction) -> None:
    turns, tasks = 5, 3
    dtype, count = DTYPES[instruction.precision], instruction.lanes * instruction.factors
    # Small whole numbers, exact in every type; not negative, because some factors are unsigned.
    a, b = (np.random.default_rng(i).integers(0, 8, count) for i in range(2))
    factors = np.stack([x.astype(dtype).view(np.int32) for x in (a, b)])
    sums = np.ones((tasks, CHAINS, instruction.lanes), instruction.sum_dtype)
    argument = tvm.runtime.tensor(sums)
    build_loop(instruction, turns=turns, tasks=tasks)(tvm.runtime.tensor(factors), argument)
    products = (a * b).reshape(instruction.lanes, instruction.factors).sum(axis=1)
    expected = np.broadcast_to(1 + turns * products, sums.shape)
    np.testing.assert_array_equal(argument.numpy(), expected)


def test_every_machine_has_float32() -> None:
    assert {i.machine for i in INSTRUCTIONS if i.precision == "f32"} == {"x86_64", "aarch64"}
    assert "f32" in {i.precision for i in known_instructions()}
