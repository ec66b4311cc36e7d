"""Made-up weights: of the right shapes, and numbers in every format."""

import ml_dtypes
import numpy as np
import pytest

from llmc.artifact import WeightTensor
from llmc.runtime.weights import _random

_BITS = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "fp8": ml_dtypes.float8_e4m3fn,
    "f32": np.float32,
}


@pytest.mark.parametrize("name", _BITS)
def test_made_up_weights_are_numbers_whatever_type_holds_them(name):
    dtype = "float32" if name == "f32" else "int32"
    weight = WeightTensor(
        name="w",
        file="weights-00001.safetensors",
        dtype=dtype,
        shape=[4, 256, 8],
        format=name,
        layout="chunk32",
        sources=["w"],
        num_bytes=4 * 256 * 8 * 4,
    )
    made = _random(weight, np.random.default_rng(0))
    assert (made.shape, made.dtype.name) == ((4, 256, 8), dtype)
    values = made.view(_BITS[name]).astype(np.float32)
    assert np.isfinite(values).all()
    assert values.std() > 0
