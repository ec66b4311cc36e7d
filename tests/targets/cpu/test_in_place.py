"""Products that are written over their residual, against those that are not."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import tvm
from emulated_tiles import Library, needs_vectors
from integer_products import Case
from matrices import random_matrix

from llmc.formats import FORMATS
from llmc.targets.cpu.kernels.bfloat16_linear import bfloat16_linear
from llmc.targets.cpu.kernels.integer_linear import integer_linear
from llmc.targets.cpu.kernels.linear import linear
from llmc.targets.cpu.layout import pack
from llmc.targets.cpu.parameters import PARAMETERS

AMX = PARAMETERS["amx"]  # has all kinds of products
M = 72  # four panels and a half

Make = Callable[..., tvm.tirx.PrimFunc]


def _floats(tokens: int | None, **options: bool) -> tvm.tirx.PrimFunc:
    return linear(FORMATS["q4_0"], M, 640, tokens, params=AMX.linear, **options)


def _few_floats(tokens: int | None, **options: bool) -> tvm.tirx.PrimFunc:
    return linear(FORMATS["q4_0"], M, 640, tokens, params=AMX.few, **options)


def _bfloat16(tokens: int | None, **options: bool) -> tvm.tirx.PrimFunc:
    return bfloat16_linear(M, 640, tokens, params=AMX.bfloat16, **options)


def _integers(k: int) -> Make:
    def make(tokens: int | None, **options: bool) -> tvm.tirx.PrimFunc:
        return integer_linear(
            FORMATS["q4_0"], M, k, tokens, block=32, params=AMX.integer, **options
        )

    return make


# Bytes in tiles take multiples of 64 features only.
KINDS: dict[str, Make] = {
    "floats": _floats,
    "few_floats": _few_floats,
    "bfloat16": _bfloat16,
    "integers": _integers(4160),
    "integers_608": _integers(608),
}
# One, a few in vectors, a few in tiles, many in tiles.
TOKENS = (1, 3, 12, 40)

pytestmark = needs_vectors


@pytest.fixture(scope="module")
def library() -> Library:
    functions = {}
    for kind, make in KINDS.items():
        for name, tokens in (("one", 1), ("many", None)):
            for place, in_place in (("apart", False), ("in_place", True)):
                functions[f"{kind}_{name}_{place}"] = make(
                    tokens, bias=True, residual=True, in_place=in_place
                )
    return Library(functions)


def _arguments(kind: str, tokens: int) -> list[np.ndarray]:
    """Those of a product: the last two are the residual and y."""
    if kind.startswith("integers"):
        k = 608 if kind.endswith("608") else 4160
        return Case(FORMATS["q4_0"], M, k, tokens, 32).arguments()[0]
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((1, tokens, 640)).astype(np.float32)
    fmt = FORMATS["bf16" if kind == "bfloat16" else "q4_0"]
    if kind == "bfloat16":
        x = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    weights = pack(fmt, [random_matrix(rng, fmt, M, 640)[0]])
    bias = rng.standard_normal(M).astype(np.float32)
    residual = rng.standard_normal((1, tokens, M)).astype(np.float32)
    return [x, *weights, bias, residual, np.full_like(residual, np.nan)]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_the_same_bits(library: Library, kind: str, tokens: int) -> None:
    arrays = _arguments(kind, tokens)
    name = f"{kind}_{'one' if tokens == 1 else 'many'}"
    apart = library.run(f"{name}_apart", *arrays)
    np.testing.assert_array_equal(library.run(f"{name}_in_place", *arrays[:-1]), apart)
    assert np.isfinite(apart).all()
