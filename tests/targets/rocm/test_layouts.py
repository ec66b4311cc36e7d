"""What the lanes of a wavefront hold and exchange, against descriptions that are not ours."""

import re
from pathlib import Path

import numpy as np
import pytest
from tvm.s_tir.tensor_intrin import rocm as tvm_rocm

import llmc.targets.rocm.code_objects as code_objects
from llmc.targets.rocm.kernels.matrix_instruction import MFMA, SIDE, WMMA

FUNCTIONS = Path(code_objects.__file__).with_name("device_functions.ll").read_text()


def test_mfma_holds_what_tvms_own_maps_say():
    """Both matrices by rows of 16 features, as a lane's registers; the product likewise."""
    for row in range(SIDE):
        for feature in range(SIDE):
            lane, register = tvm_rocm.shared_16x16_to_local_64x4_layout_A(row, feature)
            assert MFMA.line(lane) == row
            assert MFMA.group(lane) * MFMA.lane_features + register == feature
            # B lies by columns here: its column takes the row's place.
            assert tvm_rocm.shared_16x16_to_local_64x4_layout_B(feature, row) == (lane, register)
            lane, output = tvm_rocm.shared_16x16_to_local_64x4_layout_C(row, feature)
            assert (MFMA.output_row(lane, output), MFMA.line(lane)) == (row, feature)


def test_wmma_holds_what_amds_manual_shows():
    """RDNA 3, "Wave Matrix Multiply Accumulate", 32 lanes: rows 0, 2, … in lanes 0 to 15."""
    assert (WMMA.line(5), WMMA.group(5)) == (WMMA.line(21), WMMA.group(21)) == (5, 0)
    assert [WMMA.output_row(3, output) for output in range(8)] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert [WMMA.output_row(19, output) for output in range(8)] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert WMMA.line(19) == 3


@pytest.mark.parametrize("instruction", [MFMA, WMMA], ids=["mfma", "wmma"])
def test_a_wavefront_multiplies_two_matrices(instruction):
    """Every product once: the sums of what the lanes hold are A · B."""
    a, b = np.random.default_rng(0).integers(-9, 9, (2, SIDE, SIDE))
    lanes = range(instruction.wavefront)
    held = {
        (instruction.line(lane), instruction.group(lane) * instruction.lane_features + n)
        for lane in lanes
        for n in range(instruction.lane_features)
    }
    assert held == {(row, feature) for row in range(SIDE) for feature in range(SIDE)}
    product = np.full((SIDE, SIDE), 99)
    for lane in lanes:
        for output in range(instruction.outputs):
            row, column = instruction.output_row(lane, output), instruction.line(lane)
            assert product[row, column] == 99
            product[row, column] = a[row] @ b[:, column]
    np.testing.assert_array_equal(product, a @ b)


def partners(control):
    """The lane that each of 32 reads by a DPP control word (LLVM's AMDGPU manual, dpp_ctrl)."""
    within = {
        0x140: lambda lane: 15 - lane,
        0x141: lambda lane: lane // 8 * 8 + 7 - lane % 8,
    }.get(control, lambda lane: lane // 4 * 4 + (control >> 2 * (lane % 4) & 3))
    return [lane // 16 * 16 + within(lane % 16) for lane in range(32)]


@pytest.mark.parametrize("name", ["sum", "maximum"])
def test_all_lanes_get_the_same_reduction(name):
    body = re.search(rf"@llmc_{name}32\(.*?^}}", FUNCTIONS, re.M | re.S)[0]
    controls = [int(n) for n in re.findall(r"update\.dpp.*?, i32 (\d+), i32 15, i32 15", body)]
    [swizzle] = [int(n) for n in re.findall(r"ds\.swizzle\(i32 %\w+, i32 (\d+)\)", body)]
    # Swizzle's pattern: bits 0 to 4 keep, 5 to 9 set, 10 to 14 flip bits of the lane's number.
    assert swizzle == 0b11111 | 16 << 10
    combine = np.add if name == "sum" else np.maximum
    values = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    whole = values.copy()
    for read in [*map(partners, controls), [lane ^ 16 for lane in range(32)]]:
        whole = combine(whole, whole[read])
    assert len(set(whole.tolist())) == 1
    expected = values.sum(dtype=np.float64) if name == "sum" else values.max()
    assert abs(whole[0] - expected) < 1e-5  # 32 roundings of numbers below ten
