"""The packed order is what its docstring says, read back code by code."""

import numpy as np
import pytest
from gpu_formats import ALL, features_of
from matrices import random_matrix

from llmc.errors import CompileError
from llmc.formats import FORMATS, QuantizedMatrix
from llmc.targets.gpu.layout import chunk_features, code_offsets, pack, packed_parts

M = 70  # fills no panel


def read_back(fmt, arrays, m, k):
    """The values `[m, k]` float64 of packed arrays, one code at a time."""
    values = np.zeros((m, k))
    offsets, features = code_offsets(fmt.bits), chunk_features(fmt)
    per_word = features // 4
    for row in range(m):
        for column in range(k):
            chunk, rest = divmod(column, features)
            word, offset = divmod(rest, per_word)
            stored = arrays[0][row // 32, chunk, row % 32, word]
            shift = offsets.index(offset) * fmt.bits
            bits = int(stored.view(np.uint32)) >> shift & ((1 << fmt.bits) - 1)
            values[row, column] = value_of(fmt, bits)
            if not fmt.is_float:
                group = column // fmt.group if fmt.group else 0
                scales = [a[row // 32, group, row % 32].astype(np.float64) for a in arrays[1:]]
                values[row, column] = values[row, column] * scales[0] + sum(scales[1:])
    return values


def value_of(fmt, bits):
    if fmt.bits == 32:
        return np.uint32(bits).view(np.float32)
    if fmt.float_dtype == "bfloat16":
        return np.uint32(bits << 16).view(np.float32)
    if fmt.float_dtype == "float16":
        return np.uint16(bits).view(np.float16)
    if fmt.float_codes:
        return np.uint8(bits).view(fmt.code_dtype).astype(np.float64)
    if fmt.code_dtype == "int8":
        return np.uint8(bits).view(np.int8)
    return bits - fmt.zero_point


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_every_code_lies_where_the_layout_says(fmt):
    k = features_of(fmt)
    matrix, exact = random_matrix(np.random.default_rng(3), fmt, M, k)
    arrays = pack(fmt, [matrix], stacked=False)
    parts = packed_parts(fmt, M, k)
    assert [(a.shape, a.dtype.name) for a in arrays] == [(p.shape, p.dtype) for p in parts]
    np.testing.assert_array_equal(read_back(fmt, arrays, M, k), exact)


@pytest.mark.parametrize("name", ["f32", "bf16", "q4_k", "q6_k"])
def test_a_stack_is_its_matrices_packed_one_by_one(name):
    fmt = FORMATS[name]
    rng = np.random.default_rng(4)
    matrices = [random_matrix(rng, fmt, 33, 256)[0] for _ in range(3)]
    stacked = pack(fmt, matrices, stacked=True)
    parts = packed_parts(fmt, 33, 256, num_experts=3)
    assert [a.shape for a in stacked] == [p.shape for p in parts]
    for index, matrix in enumerate(matrices):
        for whole, single in zip(stacked, pack(fmt, [matrix], stacked=False), strict=True):
            np.testing.assert_array_equal(whole[index], single)


def test_what_does_not_fit_is_named():
    with pytest.raises(CompileError, match=r"group 32 does not divide 40"):
        packed_parts(FORMATS["q4_0"], 8, 40)
    with pytest.raises(CompileError, match=r"\[0, 8\]"):
        packed_parts(FORMATS["f32"], 0, 8)
    with pytest.raises(CompileError, match="expected codes"):
        pack(FORMATS["q4_0"], [np.zeros((8, 32), np.float32)], stacked=False)
    ones = np.ones((8, 32), np.float32)
    matrix, _ = random_matrix(np.random.default_rng(0), FORMATS["q4_0"], 8, 32)
    with pytest.raises(CompileError, match="got a matrix in q4_0"):
        pack(FORMATS["f32"], [matrix], stacked=False)
    with pytest.raises(CompileError, match=r"matrix 1 of a stack of \[8, 32\]"):
        pack(FORMATS["f32"], [ones, ones[:4]], stacked=True)
    without = QuantizedMatrix(
        format=FORMATS["q4_1"], codes=matrix.codes, scales=matrix.scales, mins=None
    )
    with pytest.raises(CompileError, match="no minimums"):
        pack(FORMATS["q4_1"], [without], stacked=False)
