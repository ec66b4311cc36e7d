"""Experts' products of quantized activations, against float64."""

from functools import cache

import numpy as np
import pytest
from host_library import HostLibrary
from integer_products import TOLERANCE
from matrices import random_matrix

from llmc.formats import FORMATS
from llmc.targets.cpu.kernels.integer import activation_block, sum_factor, unit_of
from llmc.targets.cpu.kernels.integer_grouped_linear import integer_grouped_linear
from llmc.targets.cpu.layout import pack
from llmc.targets.cpu.parameters import PARAMETERS

X, M, K, TOP_K = 6, 40, 512, 2  # two panels and a half; two super-blocks
FORMATS_OF = {"avx512vnni": ["w8", "q4_0", "q4_1", "q6_k", "iq4_nl"], "avx2": ["w8", "q4_1"]}


@cache
def library_of(level):
    """Per-token rows with a bias, and rows of their own without."""
    params = PARAMETERS[level].integer
    return HostLibrary(
        {
            f"{name}_{shared}": integer_grouped_linear(
                FORMATS[name],
                X,
                M,
                K,
                TOP_K,
                per_token_input=shared,
                block=activation_block(FORMATS[name], K, params.block),
                bias=shared,
                params=params,
            )
            for name in FORMATS_OF[level]
            for shared in (True, False)
        },
        level,
    )


def coded(rng, fmt, rows):
    """Random activations: the kernel's three arrays, and their values `[R, K]` float64."""
    block = activation_block(fmt, K, 32)
    unit = unit_of(fmt, block)
    codes = rng.integers(-127, 128, (1, rows, K)).astype(np.int8)
    scales = rng.uniform(0, 0.02, (1, rows, K // block)).astype(np.float32)
    sums = codes.reshape(1, rows, K // unit, unit).sum(-1, dtype=np.int32) * sum_factor(fmt)
    values = codes[0].reshape(rows, K // block, block) * scales[0, :, :, None].astype(np.float64)
    return [codes, scales, sums.astype(np.int32)], values.reshape(rows, K)


@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("level", "name"), [(level, name) for level, names in FORMATS_OF.items() for name in names]
)
def test_each_choice_gets_its_expert_s_product(level, name, shared, tokens):
    fmt = FORMATS[name]
    rng = np.random.default_rng(tokens)
    pairs = [random_matrix(rng, fmt, M, K) for _ in range(X)]
    # Experts 0 and 5 are never chosen; 3 by every token: more rows than one register tile has.
    ids = np.stack([np.full(tokens, 3), rng.choice([1, 2, 4], tokens)], axis=1).astype(np.int32)
    arrays, x = coded(rng, fmt, tokens if shared else tokens * TOP_K)
    bias = rng.standard_normal((X, M)).astype(np.float32)
    weights = pack(fmt, [matrix for matrix, _ in pairs], stacked=True)
    y = np.full((tokens * TOP_K, M), np.nan, np.float32)
    extra = [bias] if shared else []
    result = library_of(level).run(f"{name}_{shared}", *arrays, ids, *weights, *extra, y)
    for choice, expert in enumerate(ids.reshape(-1)):
        row, exact = x[choice // TOP_K if shared else choice], pairs[expert][1]
        expected = exact @ row + (bias[expert] if shared else 0)
        magnitude = np.abs(exact) @ np.abs(row) + np.abs(bias[expert])
        assert (np.abs(result[choice] - expected) <= TOLERANCE * magnitude).all()
    assert result.shape == (tokens * TOP_K, M)
