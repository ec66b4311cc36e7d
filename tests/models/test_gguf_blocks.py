"""Blocks taken apart must give the very floats that the `gguf` package's dequantizers give."""

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tiny_gguf import HALVES, random_blocks

from llmc.formats import FORMATS
from llmc.models.gguf_blocks import take_apart, to_dense


def test_every_gguf_format_is_covered() -> None:
    assert set(HALVES) == {name for name in FORMATS if name.startswith(("q", "iq"))}


@pytest.mark.parametrize("name", HALVES)
def test_codes_and_scales_give_exactly_the_dequantized_values(name: str) -> None:
    type_, blocks = random_blocks(name, 5, 3)

    matrix = take_apart(type_, blocks)

    assert matrix is not None
    assert matrix.format is FORMATS[name]
    # Exact: every format multiplies the same float32 operands in the same order as the reference.
    np.testing.assert_array_equal(matrix.dequantize(), dequantize(blocks, type_))


@pytest.mark.parametrize("name", HALVES)
def test_parts_have_the_types_and_shapes_of_the_format(name: str) -> None:
    type_, blocks = random_blocks(name, 4, 2)
    matrix = take_apart(type_, blocks)

    assert matrix is not None
    k = 2 * GGML_QUANT_SIZES[type_][0]
    assert matrix.codes.dtype == matrix.format.code_dtype
    assert matrix.codes.shape == (4, k)
    assert matrix.scales.dtype == matrix.format.scale_dtype
    assert matrix.scales.shape == (4, matrix.format.num_groups(k))
    assert (matrix.mins is not None) == matrix.format.has_min
    if matrix.mins is not None:
        assert matrix.mins.dtype == matrix.format.scale_dtype
        assert matrix.mins.shape == matrix.scales.shape


@pytest.mark.parametrize("name", ["iq4_xs", "tq2_0", "mxfp4"])
def test_a_type_without_a_format_is_read_as_values(name: str) -> None:
    type_ = GGMLQuantizationType[name.upper()]
    num_bytes = GGML_QUANT_SIZES[type_][1]
    blocks = np.random.default_rng(1).integers(0, 60, (3, 2 * num_bytes), dtype=np.uint8)

    assert take_apart(type_, blocks) is None
    np.testing.assert_array_equal(to_dense(type_, blocks), dequantize(blocks, type_))


def test_long_matrices_are_read_in_chunks_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    type_, blocks = random_blocks("q6_k", 7, 1)
    monkeypatch.setattr("llmc.models.gguf_blocks._CHUNK_VALUES", 512)

    np.testing.assert_array_equal(to_dense(type_, blocks), dequantize(blocks, type_))
