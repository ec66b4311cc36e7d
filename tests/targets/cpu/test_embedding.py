import numpy as np
import pytest
from matrices import ON_CPU, build, random_matrix, tensor

from llmc.targets.cpu.kernels.embedding import embedding
from llmc.targets.cpu.layout import pack

V = 37


def features(fmt):
    """Not a multiple of a word where the format allows it."""
    return 131 if fmt.is_float or fmt.group == 0 else 256


@pytest.fixture(scope="module")
def library():
    return build({f.name.replace("-", "_"): embedding(f, V, features(f)) for f in ON_CPU})


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("fmt", ON_CPU, ids=lambda f: f.name)
def test_rows_come_back_in_the_order_of_the_ids(library, fmt, tokens):
    rng = np.random.default_rng(tokens)
    matrix, exact = random_matrix(rng, fmt, V, features(fmt))
    ids = rng.integers(0, V, (1, tokens)).astype(np.int32)
    ids[0, 0] = V - 1  # the partial panel's last row
    y = tensor(np.full((1, tokens, features(fmt)), np.nan, np.float32))
    library[fmt.name.replace("-", "_")](tensor(ids), *map(tensor, pack(fmt, [matrix])), y)
    # code · scale + min: two roundings of float32, relative to the larger of the terms (at most 8).
    np.testing.assert_allclose(y.numpy()[0], exact[ids[0]], rtol=0, atol=8 * 2**-23)
