"""Calibrated quantization: codes that keep a product's outputs near, rather than its weights.

For inputs X `[N, K]` of a product the squared error of its outputs is `tr(E H Eᵀ)`, with E the
error of the weights and H = XᵀX. GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds one input
feature after the other, the most active first, and moves what each rounding costs to the features
not yet rounded, along the Cholesky factor of H's inverse. Scales and minimums are chosen before, so
that each feature keeps its group in any order; H's diagonal weighs the errors they are chosen by.

Coordinate descent follows (as in QuantEase, arXiv:2309.01885): each code is chosen anew with all
others fixed, which can only lower the error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from llmc.compiler.quantizer import Grid, code_range, fit_grid
from llmc.formats import QuantizedMatrix, WeightFormat

Float32 = npt.NDArray[np.float32]

_BLOCK = 32
"""Features rounded between two updates of all the later ones, which are matrix products."""
_DAMPINGS = (0.01, 0.1, 1.0)
"""Shares of H's mean diagonal added to it; the larger ones only where the factor does not exist."""
_DESCENTS = 2
_THREADED = 1 << 22
"""Weights of a matrix from which on more than one thread pays: four times slower below, measured
with a thousand columns on two shared cores."""


class Activations:
    """What a calibration has seen of a product's inputs: H = XᵀX `[K, K]` of `num_rows` rows."""

    def __init__(self, hessian: Float32, num_rows: int) -> None:
        self.hessian = hessian
        self.num_rows = num_rows

    @classmethod
    def of(cls, inputs: torch.Tensor) -> Activations:
        """Of inputs `[N, K]` float32."""
        return cls((inputs.T @ inputs).numpy(), len(inputs))

    @property
    def importance(self) -> Float32:
        """H's diagonal `[K]`."""
        return np.ascontiguousarray(self.hessian.diagonal())

    @cached_property
    def order(self) -> npt.NDArray[np.intp]:
        """The input features, the most active first."""
        return np.argsort(-self.importance, kind="stable")

    @cached_property
    def factored(self) -> tuple[Float32, Float32]:
        """(H damped, upper Cholesky factor of its inverse), features in `order`."""
        ordered = torch.from_numpy(self.hessian[np.ix_(self.order, self.order)])
        mean = float(ordered.diagonal().mean())
        for share in _DAMPINGS:
            damped = ordered.clone()
            damped.diagonal().add_(share * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if int(failed):
                continue
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(factor).all()):
                return damped.numpy(), factor.numpy()
        identity = np.eye(len(ordered), dtype=np.float32)  # inputs all zero: round to nearest
        return identity, identity


def gptq(values: Float32, fmt: WeightFormat, inputs: Activations) -> QuantizedMatrix:
    """The matrix `[M, K]` float32 in an affine format, for products with such inputs.

    Raises as `quantizer.quantize` does.
    """
    grid = fit_grid(values, fmt, inputs.importance)
    with _threads_for(values.size):
        hessian, factor = inputs.factored
        features = _Features(grid, values.shape[1], inputs.order)
        # Features as rows: those of all outputs are contiguous.
        weights = np.ascontiguousarray(values.T, np.float32)[inputs.order]
        codes = _round_in_order(weights.copy(), factor, features)
        for _ in range(_DESCENTS):
            _descend(weights, codes, hessian, features)
    natural = np.empty_like(codes)
    natural[inputs.order] = codes
    return grid.matrix(natural.T)


class _Features:
    """Rounds single input features of a matrix to its grid; features are in a given order."""

    def __init__(self, grid: Grid, k: int, order: npt.NDArray[np.intp]) -> None:
        self._lowest, self._highest = code_range(grid.format)
        group = order // (k // grid.scales.shape[1])
        self._scales = np.ascontiguousarray(grid.scales.T)[group]
        zero = self._scales == 0
        self._inverse = np.where(zero, 0, 1 / np.where(zero, 1, self._scales)).astype(np.float32)
        self._mins = None
        if grid.mins is not None:
            self._mins = np.ascontiguousarray(grid.mins.T)[group]

    def nearest(self, at: int, values: Float32) -> Float32:
        """Codes `[M]` of feature `at`."""
        above = values if self._mins is None else values - self._mins[at]
        codes: Float32 = above * self._inverse[at]
        np.rint(codes, out=codes)
        np.maximum(codes, self._lowest, out=codes)  # np.clip costs twice as much
        np.minimum(codes, self._highest, out=codes)
        return codes

    def values(self, at: int | slice, codes: Float32) -> Float32:
        """What the codes `[M]` of feature `at`, or those `[n, M]` of a slice, stand for."""
        values: Float32 = codes * self._scales[at]
        if self._mins is not None:
            values += self._mins[at]
        return values


def _round_in_order(weights: Float32, factor: Float32, features: _Features) -> Float32:
    """Codes `[K, M]` of `weights` `[K, M]`, which are overwritten."""
    k = len(weights)
    codes = np.empty_like(weights)
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        block, upper = weights[start:end], factor[start:end, start:end]
        for i in range(end - start):
            code = features.nearest(start + i, block[i])
            codes[start + i] = code
            block[i] -= features.values(start + i, code)
            block[i] /= upper[i, i]  # from here on, the row holds the error to spread
            if i + 1 < end - start:
                block[i + 1 :] -= upper[i, i + 1 :, None] * block[i]
        _subtract_product(weights[end:], factor[start:end, end:].T, block)
    return codes


def _descend(weights: Float32, codes: Float32, hessian: Float32, features: _Features) -> None:
    """Chooses each code anew, all others fixed; overwrites `codes` `[K, M]`."""
    k = len(weights)
    error = weights - features.values(slice(0, k), codes)
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        inside = hessian[start:end, start:end]
        gradient = _product(hessian[start:end], error)
        for i in range(end - start):
            at = start + i
            held = weights[at] - error[at]
            code = features.nearest(at, held + gradient[i] / inside[i, i])
            codes[at] = code
            moved = features.values(at, code) - held
            error[at] -= moved
            if i + 1 < end - start:
                gradient[i + 1 :] -= inside[i + 1 :, i, None] * moved


@contextmanager
def _threads_for(size: int) -> Iterator[None]:
    """One thread for a small matrix: its products are over before a second one has begun."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if size < _THREADED else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# torch multiplies, not NumPy: the threads of one library wait busily while the other's work.
def _product(a: Float32, b: Float32) -> Float32:
    product: Float32 = (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()
    return product


def _subtract_product(target: Float32, a: Float32, b: Float32) -> None:
    if len(target):
        torch.from_numpy(target).addmm_(torch.from_numpy(a), torch.from_numpy(b), alpha=-1)
