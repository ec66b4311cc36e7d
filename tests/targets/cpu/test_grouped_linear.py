"""Mixture-of-experts products against a float64 loop over the choices."""

import numpy as np
import pytest
from matrices import build, random_matrix, tensor

from llmc.formats import FORMATS
from llmc.targets.cpu.kernels.grouped_linear import grouped_linear
from llmc.targets.cpu.layout import pack
from llmc.targets.cpu.parameters import PARAMETERS

X, M, TOP_K = 6, 40, 2
FORMAT_NAMES = ["f32", "bf16", "q4_1", "q6_k", "w8"]
KINDS = ["few", "linear"]


def features(fmt):
    if fmt.sub_scales is not None:
        return 2 * fmt.sub_scales.group
    return 301 if fmt.is_float or fmt.group == 0 else 320


@pytest.fixture(scope="module")
def library():
    """Per-token rows with a bias, and rows of their own without."""
    return build(
        {
            f"{name}_{kind}_{shared}": grouped_linear(
                FORMATS[name],
                X,
                M,
                features(FORMATS[name]),
                TOP_K,
                per_token_input=shared,
                bias=shared,
                params=getattr(PARAMETERS["avx2"], kind),
            )
            for name in FORMAT_NAMES
            for kind in KINDS
            for shared in (True, False)
        }
    )


def experts(fmt, rng):
    pairs = [random_matrix(rng, fmt, M, features(fmt)) for _ in range(X)]
    return [matrix for matrix, _ in pairs], [exact for _, exact in pairs]


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_each_choice_gets_its_expert_s_product(library, name, kind, shared, tokens):
    fmt = FORMATS[name]
    rng = np.random.default_rng(tokens)
    matrices, exact = experts(fmt, rng)
    # Experts 0 and 5 are never chosen; 3 by every token.
    others = rng.choice([1, 2, 4], tokens)
    ids = np.stack([np.full(tokens, 3), others], axis=1).astype(np.int32)
    x = rng.standard_normal((tokens if shared else tokens * TOP_K, features(fmt)))
    x = x.astype(np.float32)
    bias = rng.standard_normal((X, M)).astype(np.float32)
    y = tensor(np.full((tokens * TOP_K, M), np.nan, np.float32))
    extra = [tensor(bias)] if shared else []
    function = library[f"{name}_{kind}_{shared}"]
    function(tensor(x), tensor(ids), *map(tensor, pack(fmt, matrices, stacked=True)), *extra, y)
    for choice, expert in enumerate(ids.reshape(-1)):
        row = x[choice // TOP_K if shared else choice].astype(np.float64)
        expected = exact[expert] @ row + (bias[expert] if shared else 0)
        # As in test_linear: rounding errors of some 300 sums walk randomly.
        magnitude = np.abs(exact[expert]) @ np.abs(row) + 1
        assert (np.abs(y.numpy()[choice] - expected) <= 2e-6 * magnitude).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_experts_that_nobody_chose_are_not_used(library, kind):
    fmt = FORMATS["f32"]
    rng = np.random.default_rng(0)
    matrices, exact = experts(fmt, rng)
    for expert in (0, 2, 3, 5):
        matrices[expert] = np.full_like(matrices[expert], np.nan)
    x = rng.standard_normal((9 * TOP_K, features(fmt))).astype(np.float32)
    ids = np.tile(np.array([[4, 1]], np.int32), (9, 1))
    y = tensor(np.zeros((9 * TOP_K, M), np.float32))
    packed = map(tensor, pack(fmt, matrices, stacked=True))
    library[f"f32_{kind}_False"](tensor(x), tensor(ids), *packed, y)
    assert np.isfinite(y.numpy()).all()
    np.testing.assert_allclose(y.numpy()[7], exact[1] @ x[7], atol=1e-3)
