"""Rows that go through experts: arguments of the kernels, and what they have to compute."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matrices import random_matrix

from llmc.targets.gpu import layout


@dataclass(frozen=True)
class RoutedRows:
    """`arrays` are a grouped product's arguments but for its output `[tokens * top_k, M]`."""

    arrays: tuple[Any, ...]
    products: np.ndarray  # float64, without the bias
    biases: np.ndarray


def routed_rows(fmt, m, k, *, num_experts, top_k, tokens, shared_input):
    """Random rows, one a token where they share their input, and random experts `[m, k]`.

    The last expert but one is never chosen, and a token may choose one twice.
    """
    rng = np.random.default_rng(tokens)
    pairs = [random_matrix(rng, fmt, m, k) for _ in range(num_experts)]
    weights = layout.pack(fmt, [matrix for matrix, _ in pairs], stacked=True)
    bias = rng.standard_normal((num_experts, m)).astype(np.float32)
    chosen = [e for e in range(num_experts) if e != num_experts - 2]
    ids = rng.choice(chosen, (tokens, top_k)).astype(np.int32)
    num_rows = tokens if shared_input else tokens * top_k
    x = rng.standard_normal((num_rows, k)).astype(np.float32)
    rows = np.repeat(x, top_k, axis=0) if shared_input else x
    products = [pairs[e][1] @ row for e, row in zip(ids.ravel(), rows, strict=True)]
    return RoutedRows(
        arrays=(x, ids, *weights, bias), products=np.stack(products), biases=bias[ids.ravel()]
    )
