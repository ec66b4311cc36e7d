"""Calibrated codes against round to nearest, on inputs whose features are correlated as real ones
are."""

import numpy as np
import pytest
import torch

from llmc.compiler.gptq import Activations, gptq
from llmc.compiler.quantizer import quantize
from llmc.errors import CompileError
from llmc.formats import FORMATS

FOUR_BITS = ["w4-g32", "w4-g128", "w4-g32-asym"]
K, M, N = 256, 96, 1024


def inputs(n: int = N, seed: int = 0) -> np.ndarray:
    """Rows with a few strong features and a common part of low rank."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(40, K))  # the same for every seed
    x = rng.normal(size=(n, 40)) @ mixing / 6 + 0.3 * rng.normal(size=(n, K))
    x[:, ::31] *= 8
    return x.astype(np.float32)


def weights() -> np.ndarray:
    return (np.random.default_rng(1).standard_t(5, (M, K)) * 0.02).astype(np.float32)


def output_error(x: np.ndarray, exact: np.ndarray, found: np.ndarray) -> float:
    return float(np.square(x.astype(np.float64) @ (exact - found).T).sum())


@pytest.mark.parametrize("name", FOUR_BITS)
def test_outputs_on_other_inputs_are_twice_as_exact_as_with_nearest_codes(name):
    """On inputs the calibration has not seen; a third of the error or less is what it reaches."""
    fmt, w, unseen = FORMATS[name], weights(), inputs(seed=5)
    seen = Activations.of(torch.from_numpy(inputs()))
    nearest = output_error(unseen, w, quantize(w, fmt).dequantize())
    calibrated = output_error(unseen, w, gptq(w, fmt, seen).dequantize())
    assert calibrated < nearest / 2


def test_descent_never_loses_and_gains_a_little(monkeypatch):
    fmt, w, x = FORMATS["w4-g64"], weights(), inputs()
    errors = []
    for descents in (0, 1, 2):
        monkeypatch.setattr("llmc.compiler.gptq._DESCENTS", descents)
        found = gptq(w, fmt, Activations.of(torch.from_numpy(x)))
        # Of the damped objective that it descends: the damping is a hundredth of the mean diagonal.
        damping = 0.01 * np.square(x).sum() / K
        errors.append(
            output_error(x, w, found.dequantize())
            + damping * np.square(w - found.dequantize()).sum()
        )
    assert errors[2] < errors[1] < errors[0]


def test_independent_inputs_of_one_size_leave_nearest_codes_as_they_are():
    """H is the identity: there is nothing to compensate, and every feature weighs the same."""
    fmt, w = FORMATS["w4-g32"], weights()
    identity = Activations(np.eye(K, dtype=np.float32), K)
    found = gptq(w, fmt, identity)
    np.testing.assert_array_equal(found.codes, quantize(w, fmt).codes)
    np.testing.assert_array_equal(found.scales, quantize(w, fmt).scales)


@pytest.mark.parametrize("name", FOUR_BITS)
def test_codes_and_scales_have_the_types_of_the_format(name):
    fmt = FORMATS[name]
    matrix = gptq(weights(), fmt, Activations.of(torch.from_numpy(inputs())))
    assert matrix.codes.dtype == np.uint8
    assert matrix.codes.min() >= 0
    assert matrix.codes.max() <= 15
    assert matrix.scales.dtype == np.float16
    assert matrix.scales.shape == (M, K // fmt.group)
    assert (matrix.mins is not None) == fmt.has_min


def test_features_that_are_never_active_are_rounded_to_nearest():
    w, x = weights(), inputs()
    x[:, 32:64] = 0  # a whole group of 32
    found = gptq(w, FORMATS["w4-g32"], Activations.of(torch.from_numpy(x))).dequantize()
    assert np.isfinite(found).all()
    # No input weighs these errors, so the plain scale stands: half of one step, 1/7 of the extreme.
    bound = np.abs(w[:, 32:64]).max(axis=1, keepdims=True) / 7 / 2
    assert (np.abs(found - w)[:, 32:64] <= bound * 1.001).all()


@pytest.mark.parametrize("rows", [np.zeros((8, K)), np.ones((1, K))])
def test_inputs_that_say_little_still_give_codes(rows):
    """All zero, or one row only: H has no inverse but for its damping."""
    w = weights()
    seen = Activations.of(torch.from_numpy(rows.astype(np.float32)))
    found = gptq(w, FORMATS["w4-g64"], seen).dequantize()
    assert np.abs(found - w).max() < np.abs(w).max()


def test_a_group_that_does_not_divide_is_refused_as_without_calibration():
    with pytest.raises(CompileError, match="group 128 does not divide 192"):
        gptq(weights()[:, :192], FORMATS["w4-g128"], Activations(np.eye(192, dtype=np.float32), 1))
