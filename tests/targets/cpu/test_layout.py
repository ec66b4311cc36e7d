import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from matrices import random_matrix

from llmc.errors import CompileError, UnsupportedError
from llmc.formats import FORMATS, NestedScales, QuantizedMatrix
from llmc.targets.cpu.layout import pack, packed_parts
from llmc.targets.cpu.parameters import parameters_for


def quantized(fmt, codes, scale=1.0):
    m, k = codes.shape
    scales = np.full((m, fmt.num_groups(k)), scale, fmt.scale_dtype)
    mins = np.zeros_like(scales) if fmt.has_min else None
    codes = codes.astype(fmt.code_dtype)
    return QuantizedMatrix(format=fmt, codes=codes, scales=scales, mins=mins)


@pytest.mark.parametrize("name", sorted(n for n, f in FORMATS.items() if not f.float_codes))
def test_shapes_and_types_are_known_before_the_data(name):
    fmt = FORMATS[name]
    matrix, _ = random_matrix(np.random.default_rng(0), fmt, 35, 256)
    declared = packed_parts(fmt, 35, 256)
    packed = pack(fmt, [matrix])
    assert [(a.shape, a.dtype.name) for a in packed] == [(d.shape, d.dtype) for d in declared]
    assert all(a.flags.c_contiguous for a in packed)


def test_sixteen_rows_lie_across_and_missing_rows_are_zero():
    values = np.arange(18 * 3, dtype=np.float32).reshape(18, 3) + 1
    (packed,) = pack(FORMATS["f32"], [values])
    assert packed.shape == (2, 3, 16)
    np.testing.assert_array_equal(packed[0, 2], values[:16, 2])
    np.testing.assert_array_equal(packed[1, :, :2], values[16:].T)
    assert (packed[1, :, 2:] == 0).all()


def test_a_four_bit_word_holds_features_j_and_j_plus_four_in_byte_j():
    codes = np.tile(np.arange(32) % 16, (16, 1))
    words = pack(FORMATS["q4_1"], [quantized(FORMATS["q4_1"], codes)])[0]
    as_bytes = words.view(np.uint8).reshape(1, 4, 16, 4)
    assert [f"{b:02x}" for b in as_bytes[0, 0, 5]] == ["40", "51", "62", "73"]
    assert [f"{b:02x}" for b in as_bytes[0, 1, 5]] == ["c8", "d9", "ea", "fb"]


def test_signed_eight_bit_codes_are_stored_plus_128():
    codes = np.array([[-128, -1, 0, 127, 5]] * 16)
    words = pack(FORMATS["w8"], [quantized(FORMATS["w8"], codes)])[0]
    assert words.shape == (1, 2, 16)
    assert words.view(np.uint8).reshape(2, 16, 4)[0, 3].tolist() == [0, 127, 128, 255]
    assert words.view(np.uint8).reshape(2, 16, 4)[1, 3].tolist() == [133, 0, 0, 0]


def test_codes_of_five_bits_are_words_of_four_and_words_of_one():
    codes = np.tile(np.arange(32), (16, 1))
    low, high = pack(FORMATS["q5_1"], [quantized(FORMATS["q5_1"], codes)])[:2]
    as_bytes = low.view(np.uint8).reshape(4, 16, 4)
    assert [f"{b:02x}" for b in as_bytes[1, 9]] == ["c8", "d9", "ea", "fb"]
    # Bit p of byte j is feature 4 p + j; those from 16 on have the fifth bit.
    assert high.view(np.uint8).reshape(1, 16, 4)[0, 9].tolist() == [0b11110000] * 4


def test_symmetric_codes_in_planes_are_stored_plus_half_their_range():
    codes = np.array([[-32, -1, 0, 31] * 64] * 16)
    nested = NestedScales(supers=np.ones((16, 1), np.float16), subs=np.ones((16, 16), np.int8))
    low, high = pack(
        FORMATS["q6_k"], [QuantizedMatrix.of_nested(FORMATS["q6_k"], codes, nested, None)]
    )[:2]
    assert (low.view(np.uint8).reshape(-1, 4) == [0x00, 0xFF, 0x00, 0xFF]).all()
    assert (high.view(np.uint8).reshape(-1, 4) == [0x00, 0b01010101, 0b10101010, 0xFF]).all()


def test_sub_scales_of_consecutive_groups_share_bytes():
    subs = np.tile(np.arange(16, dtype=np.int8) * 4 - 32, (16, 1))
    nested = NestedScales(supers=np.ones((16, 1), np.float16), subs=subs)
    matrix = QuantizedMatrix.of_nested(FORMATS["q3_k"], np.zeros((16, 256), np.int8), nested, None)
    _, _, supers, low, high = pack(FORMATS["q3_k"], [matrix])
    assert supers.shape == (1, 1, 16)
    # Stored plus 32: 0, 4, 8, …, 60; four low bits of two groups a byte, two high ones of four.
    assert low[0, :, 3].tolist() == [0x40, 0xC8] * 4
    assert high[0, :, 3].tolist() == [0b00000000, 0b01010101, 0b10101010, 0b11111111]


@pytest.mark.parametrize("name", sorted(n for n in FORMATS if n.startswith(("q", "iq"))))
def test_a_gguf_format_takes_hardly_more_than_its_file(name):
    m, k = 64, 1024
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    stored = sum(
        int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize
        for a in packed_parts(FORMATS[name], m, k)
    )
    assert stored <= 1.03 * (m * k // block * block_bytes)


@pytest.mark.parametrize("name", sorted(n for n in FORMATS if n.startswith(("q", "iq"))))
def test_packed_codes_and_scales_are_those_of_the_matrix(name):
    """Read bit by bit, as the layout says, without the code that packs."""
    fmt = FORMATS[name]
    matrix, _ = random_matrix(np.random.default_rng(1), fmt, 16, 512)
    arrays = dict(
        zip([a.suffix for a in packed_parts(fmt, 16, 512)], pack(fmt, [matrix]), strict=True)
    )

    def joined(first, count, step):
        """Number i of row r in fields of b bits: in field p of byte j of an array of words."""
        total, base = np.zeros((16, count), int), 0
        for suffix in (first, f"{first}_high"):
            if suffix not in arrays:
                continue
            rows = arrays[suffix][0].T.copy().view(np.uint8).reshape(16, -1)
            bits = rows.shape[1] * 8 // count
            for i in range(count):
                at = i // (step * 8 // bits) * step + i % step
                field = i // step % (8 // bits)
                total[:, i] += (rows[:, at] >> (field * bits) & ((1 << bits) - 1)) << base
            base += bits
        return total

    codes = joined("codes", 512, 4)
    if fmt.codebook is not None:
        codes = np.array(fmt.codebook)[codes]
    elif not fmt.has_min:
        codes = codes - (1 << (fmt.code_bits - 1))
    np.testing.assert_array_equal(codes, matrix.codes.astype(int) - fmt.zero_point)
    for name in ("scales", "mins") if fmt.has_min else ("scales",):
        scales = arrays[name][0].T.astype(np.float32)
        if fmt.sub_scales is not None:
            subs = joined(f"sub_{name}", fmt.num_groups(512), 1) - fmt.sub_scales.zero_point
            scales = np.repeat(scales, subs.shape[1] // 2, axis=1) * subs
        np.testing.assert_array_equal(scales, getattr(matrix, name))


def test_sub_scales_are_needed_where_the_format_has_them():
    fmt = FORMATS["q6_k"]
    with pytest.raises(CompileError, match="no sub-scales of its scales"):
        pack(fmt, [quantized(fmt, np.zeros((16, 256)))])
    with pytest.raises(CompileError, match="super-blocks of 256 do not divide 288"):
        packed_parts(fmt, 16, 288)


def test_bfloat16_pairs_hold_the_even_feature_in_the_low_half():
    values = np.array([[1.0, -2.0, 3.0]] * 16, np.float32)
    (words,) = pack(FORMATS["bf16"], [values])
    halves = words.view(np.uint16).reshape(2, 16, 2)[:, 0]
    expected = values[0].astype(ml_dtypes.bfloat16).view(np.uint16)
    assert halves.ravel().tolist() == [*expected.tolist(), 0]


@pytest.mark.parametrize("name", ["f16", "bf16", "q4_1", "w8"])
def test_a_stack_is_the_matrices_one_after_the_other(name):
    fmt = FORMATS[name]
    rng = np.random.default_rng(2)
    matrices = [random_matrix(rng, fmt, 20, 64)[0] for _ in range(3)]
    packed = pack(fmt, matrices, stacked=True)
    declared = packed_parts(fmt, 20, 64, num_experts=3)
    assert [a.shape for a in packed] == [d.shape for d in declared]
    for x, matrix in enumerate(matrices):
        for array, single in zip(packed, pack(fmt, [matrix]), strict=True):
            np.testing.assert_array_equal(array[x], single)


def test_float_formats_round_to_their_own_type():
    values = np.full((16, 2), 1 / 3)
    (packed,) = pack(FORMATS["f16"], [values])
    assert packed.dtype == np.float16
    assert packed[0, 0, 0] == np.float16(1 / 3)


def test_a_matrix_in_another_format_is_refused():
    dense = np.zeros((16, 64), np.float32)
    with pytest.raises(CompileError, match=r"q4_0.*dense values"):
        pack(FORMATS["q4_0"], [dense])
    with pytest.raises(CompileError, match=r"q4_1.*q4_0"):
        pack(FORMATS["q4_1"], [quantized(FORMATS["q4_0"], dense)])
    with pytest.raises(CompileError, match=r"f32.*q4_0"):
        pack(FORMATS["f32"], [quantized(FORMATS["q4_0"], dense)])
    with pytest.raises(CompileError, match="group 32 does not divide 40"):
        packed_parts(FORMATS["q4_0"], 16, 40)
    with pytest.raises(CompileError, match="at least 1"):
        packed_parts(FORMATS["f32"], 0, 40)
    with pytest.raises(CompileError, match="empty stack"):
        pack(FORMATS["q4_0"], [], stacked=True)
    with pytest.raises(CompileError, match="matrix 1 of a stack"):
        pack(FORMATS["f32"], [dense, dense[:, :8]], stacked=True)


def test_an_unknown_instruction_set_is_named_with_the_known_ones():
    with pytest.raises(UnsupportedError, match="sse9") as caught:
        parameters_for("sse9")
    assert "avx512" in str(caught.value)
