import numpy as np
import pytest

from llmc.compiler.quantizer import _extremes, quantize
from llmc.errors import CompileError, UnsupportedError
from llmc.formats import FORMATS, WeightFormat

SCHEMES = ["w8", "w4-g32", "w4-g64", "w4-g128"]
WITH_MINIMUM = ["w4-g32-asym", "w4-g64-asym", "w4-g128-asym"]


def weights(m: int = 48, k: int = 256, seed: int = 0) -> np.ndarray:
    """Heavy-tailed, as trained weights are."""
    return (np.random.default_rng(seed).standard_t(5, (m, k)) * 0.02).astype(np.float32)


def squared_error(values: np.ndarray, approximation: np.ndarray, fmt: WeightFormat) -> np.ndarray:
    groups = fmt.num_groups(values.shape[1])
    error = (values.astype(np.float64) - approximation).reshape(len(values), groups, -1)
    return (error**2).sum(axis=2)


def plain_absmax(values: np.ndarray, fmt: WeightFormat) -> np.ndarray:
    """The usual reference: scale = largest magnitude / largest code, rounded to the scale type."""
    m, k = values.shape
    grouped = values.reshape(m, fmt.num_groups(k), -1)
    top = (1 << (fmt.bits - 1)) - 1
    scale = (np.abs(grouped).max(axis=2) / top).astype(fmt.scale_dtype).astype(np.float32)
    codes = np.clip(np.rint(grouped / scale[:, :, None]), -top - 1, top)
    return (codes * scale[:, :, None]).reshape(m, k)


@pytest.mark.parametrize("name", SCHEMES)
def test_no_group_is_worse_than_with_the_plain_scale(name):
    fmt, values = FORMATS[name], weights()
    found = squared_error(values, quantize(values, fmt).dequantize(), fmt)
    plain = squared_error(values, plain_absmax(values, fmt), fmt)
    # Errors are compared in float32 while searching: a few ulps may pass for a tie.
    assert (found <= plain * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ["w4-g32", "w4-g64", "w4-g128"])
def test_four_bits_gain_at_least_a_tenth_over_the_plain_scale(name):
    fmt, values = FORMATS[name], weights()
    found = squared_error(values, quantize(values, fmt).dequantize(), fmt).sum()
    assert found < 0.9 * squared_error(values, plain_absmax(values, fmt), fmt).sum()


@pytest.mark.parametrize("name", SCHEMES)
def test_values_inside_the_clipped_range_are_off_by_half_a_step_at_most(name):
    fmt, values = FORMATS[name], weights()
    matrix = quantize(values, fmt)
    group = values.shape[1] // matrix.scales.shape[1]
    steps = np.repeat(np.abs(matrix.scales.astype(np.float32)), group, axis=1)
    signed = matrix.codes.astype(np.int32) - fmt.zero_point
    limit = 1 << (fmt.bits - 1)
    inside = (signed > -limit) & (signed < limit - 1)
    assert inside.mean() > 0.9
    error = np.abs(values - matrix.dequantize())
    assert (error[inside] <= 0.5 * steps[inside] * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_values_on_the_code_grid_come_back_exactly(name):
    fmt = FORMATS[name]
    rng = np.random.default_rng(1)
    limit = 1 << (fmt.bits - 1)
    codes = rng.integers(-limit + 1, limit, (16, 4, 64))
    codes[:, :, 0] = limit - 1  # each group uses the whole range
    codes[:, :, 32] = -limit + 1
    values = (codes * 2.0**-9).astype(np.float32).reshape(16, 256)
    np.testing.assert_array_equal(quantize(values, fmt).dequantize(), values)


def test_fp8_rounds_to_the_nearest_of_its_numbers_and_no_worse_than_with_the_largest_at_its_top():
    fmt, values = FORMATS["fp8"], weights()
    matrix = quantize(values, fmt)
    ratio = np.abs(values / matrix.scales)
    # Three bits of mantissa; below 2^-6 steps of 2^-9. The very largest may be clipped.
    step = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(ratio, 1e-9))) - 3), 2.0**-9)
    inside = ratio <= 448
    assert inside.mean() > 0.99
    error = np.abs(values - matrix.dequantize()) / np.abs(matrix.scales)
    assert (error[inside] <= 0.5 * step[inside] * (1 + 1e-4)).all()
    top = np.abs(values).max(axis=1, keepdims=True) / np.float32(448)
    plain = (values / top).astype(fmt.code_dtype).astype(np.float32) * top
    found = squared_error(values, matrix.dequantize(), fmt)
    assert (found <= squared_error(values, plain, fmt) * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", [*SCHEMES, *WITH_MINIMUM])
def test_groups_of_zeros_stay_zero(name):
    values = weights()
    values[3] = 0
    values[5, :128] = 0
    matrix = quantize(values, FORMATS[name])
    assert np.isfinite(matrix.scales).all()
    assert (matrix.dequantize()[3] == 0).all()
    assert (matrix.dequantize()[5, :128] == 0).all()


def plain_span(values: np.ndarray, fmt: WeightFormat) -> np.ndarray:
    """The usual reference with a minimum: the smallest value is code 0, the largest is code 15."""
    m, k = values.shape
    grouped = values.reshape(m, fmt.num_groups(k), -1)
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    scale = ((high - low) / 15).astype(np.float16).astype(np.float32)[:, :, None]
    low = low.astype(np.float16).astype(np.float32)[:, :, None]
    codes = np.clip(np.rint((grouped - low) / scale), 0, 15)
    return (codes * scale + low).reshape(m, k)


@pytest.mark.parametrize("name", WITH_MINIMUM)
def test_a_minimum_is_never_worse_than_the_plain_span(name):
    fmt, values = FORMATS[name], weights() + np.float32(0.01)
    found = squared_error(values, quantize(values, fmt).dequantize(), fmt)
    plain = squared_error(values, plain_span(values, fmt), fmt)
    # Errors are compared in float32 while searching: a few ulps may pass for a tie.
    assert (found <= plain * (1 + 1e-4)).all()
    assert found.sum() < 0.95 * plain.sum()


def test_a_minimum_pays_where_values_are_not_centred():
    values = weights() + np.float32(0.05)
    with_minimum = quantize(values, FORMATS["w4-g32-asym"]).dequantize()
    without = quantize(values, FORMATS["w4-g32"]).dequantize()
    assert np.square(values - with_minimum).sum() < 0.5 * np.square(values - without).sum()


def test_blocks_with_minimums_come_back_exactly():
    """Values on a Q4_1 grid that uses its first and last code: what GGUF files hold."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (16, 8, 32)).astype(np.float32)
    codes[:, :, 3], codes[:, :, 17] = 0, 15
    scales = rng.uniform(0.001, 0.1, (16, 8, 1)).astype(np.float16).astype(np.float32)
    mins = rng.normal(0, 0.1, (16, 8, 1)).astype(np.float16).astype(np.float32)
    values = (codes * scales + mins).reshape(16, 256)
    np.testing.assert_array_equal(quantize(values, FORMATS["w4-g32-asym"]).dequantize(), values)


@pytest.mark.parametrize("name", ["w4-g64", "w4-g64-asym", "w8"])
def test_importance_moves_the_error_to_the_features_that_weigh_little(name):
    fmt, values = FORMATS[name], weights()
    importance = np.where(np.arange(256) % 4 == 0, 100, 1).astype(np.float32)
    weighed = np.square(quantize(values, fmt, importance).dequantize() - values) * importance
    plain = np.square(quantize(values, fmt).dequantize() - values) * importance
    assert weighed.sum() < plain.sum()


@pytest.mark.parametrize("name", ["w4-g32", "w4-g32-asym"])
def test_a_constant_group_comes_back_within_its_type(name):
    """No spread: the scale alone, or the minimum alone, has to carry the value (11 bits)."""
    values = np.full((4, 64), 0.3, np.float32)
    found = quantize(values, FORMATS[name]).dequantize()
    np.testing.assert_allclose(found, values, rtol=2**-11)


def test_blocks_of_rows_do_not_change_the_result():
    values = weights(m=600, k=1024)  # more than one block
    whole = quantize(values, FORMATS["w4-g64"])
    part = quantize(values[400:410], FORMATS["w4-g64"])
    np.testing.assert_array_equal(whole.codes[400:410], part.codes)
    np.testing.assert_array_equal(whole.scales[400:410], part.scales)


def test_codes_and_scales_have_the_types_of_the_format():
    matrix = quantize(weights(), FORMATS["w4-g32"])
    assert matrix.codes.dtype == np.uint8
    assert matrix.codes.max() <= 15
    assert matrix.scales.dtype == np.float16
    eight = quantize(weights(k=250), FORMATS["w8"])
    assert eight.codes.dtype == np.int8
    assert eight.scales.shape == (48, 1)


def test_what_cannot_be_quantized_is_refused_with_its_reason():
    with pytest.raises(UnsupportedError, match="q5_1"):
        quantize(weights(), FORMATS["q5_1"])
    with pytest.raises(UnsupportedError, match="bf16"):
        quantize(weights(), FORMATS["bf16"])
    with pytest.raises(CompileError, match="group 128 does not divide 192"):
        quantize(weights(k=192), FORMATS["w4-g128"])
    for column, number in ((7, np.nan), (40, np.inf), (255, -np.inf)):
        bad = weights()
        bad[1, column] = number
        with pytest.raises(CompileError, match="not finite"):
            quantize(bad, FORMATS["w8"])
        with pytest.raises(CompileError, match="not finite"):
            quantize(bad, FORMATS["w4-g32-asym"])
    with pytest.raises(CompileError, match="does not fit float16"):
        quantize(weights() * np.float32(1e9), FORMATS["w4-g32"])


@pytest.mark.parametrize("n", [1, 7, 16, 40, 100])
def test_extremes_are_found_wherever_they_lie_in_groups_of_any_size(n):
    values = np.random.default_rng(n).permuted(np.tile(np.arange(n) - n / 3, (50, 1)), axis=1)
    low, high = _extremes(values.astype(np.float32), FORMATS["w8"])
    np.testing.assert_array_equal(low[:, 0], values.min(axis=1).astype(np.float32))
    np.testing.assert_array_equal(high[:, 0], values.max(axis=1).astype(np.float32))


def test_weights_that_must_not_be_written_are_quantized_too():
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    expected = quantize(values, FORMATS["w4-g32"])
    values.flags.writeable = False
    np.testing.assert_array_equal(quantize(values, FORMATS["w4-g32"]).codes, expected.codes)
