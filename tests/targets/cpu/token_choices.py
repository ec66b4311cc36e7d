"""What choosing tokens on a device has to be, whatever the device: the host's sampler's tokens, as
likely. Test modules take these functions over and have a fixture `kernels`, a `Kernels`.
"""

import math

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from llmc.runtime.sampler import _candidates
from llmc.runtime.sampling_params import SamplingParams

VOCAB = 203
ANY = 1e30
rng = np.random.default_rng(5)


class Kernels:
    """A target's functions, compiled for a device of this machine."""

    def __init__(self, sampling, target, device):
        lower = tvm.transform.Sequential(
            [
                relax.transform.CallTIRRewrite(),
                relax.transform.StaticPlanBlockMemory(),
                relax.transform.LowerAllocTensor(),
                relax.transform.KillAfterLastUse(),
                relax.transform.LowerRuntimeBuiltin(),
                relax.transform.VMShapeLower(),
                relax.transform.AttachGlobalSymbol(),
            ]
        )
        with target:
            built = relax.build(lower(sampling.module), target=target, relax_pipeline=None)
        self._vm, self._device = relax.VirtualMachine(built, device), device

    def call(self, name, *arrays):
        """The tokens that a function chooses."""
        return self._vm[name](*(tvm.runtime.tensor(a, self._device) for a in arrays)).numpy()


def largest(kernels, logits, rows=None):
    rows = np.arange(len(logits)) if rows is None else rows
    return kernels.call("choose_largest", logits, np.asarray(rows, np.int32)).tolist()


def drawn(kernels, logits, rows, params, shares):
    """`params` for every row, each with its two uniform numbers `shares` `[R, 2]`."""
    count = len(rows)
    columns = np.empty((count, 5), np.float32)
    farthest = -math.log(params.min_p) if params.min_p else ANY
    columns[:, :3] = 1 / params.temperature, params.top_p, farthest
    columns[:, 3:] = shares
    top_k = np.full(count, params.top_k, np.int32)
    arguments = (logits, np.asarray(rows, np.int32), top_k, columns)
    found = kernels.call("choose_limited", *arguments)
    if params.top_k <= 1 and params.top_p == 1:  # no limits to heed
        np.testing.assert_array_equal(kernels.call("choose_drawn", *arguments), found)
    return found


@given(
    rows=st.integers(1, 5),
    seed=st.integers(0, 999),
    num_values=st.sampled_from([1, 2, 50, 10**6]),
    hidden=st.sampled_from([0.0, 0.5, 0.999]),
)
@settings(max_examples=15, deadline=None)
def test_the_largest_is_numpys_ties_included(kernels, rows, seed, num_values, hidden):
    random = np.random.default_rng(seed)
    logits = random.integers(-num_values, num_values + 1, (rows, VOCAB)).astype(np.float32)
    logits[random.random((rows, VOCAB)) < hidden] = -np.inf
    logits[:, random.integers(VOCAB)] = random.integers(-num_values, num_values + 1)
    with np.errstate(invalid="ignore"):  # infinities times zero
        logits *= random.choice([1.0, -0.0, 1e-38, 1e30])  # both zeros, subnormal, huge numbers
    order = random.permutation(rows)
    expected = logits.argmax(axis=1)
    expected[~np.isfinite(logits.max(axis=1))] = -1
    assert largest(kernels, logits, order) == expected[order].tolist()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 39, 100, VOCAB - 1])
def test_a_row_without_a_finite_maximum_is_given_back(kernels, bad, place):
    logits = rng.standard_normal((3, VOCAB)).astype(np.float32)
    logits[1, place] = bad
    expected = logits.argmax(axis=1)
    expected[1] = -1
    assert largest(kernels, logits) == expected.tolist()
    every = drawn(kernels, logits, [0, 1, 2], SamplingParams(top_k=9, top_p=0.9), 0.5)
    assert (every < 0).tolist() == [False, True, False]
    assert largest(kernels, np.full((1, VOCAB), -np.inf, np.float32)) == [-1]


CASES = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 40.0},
    "top_k": {"top_k": 5},
    "top_k_of_one": {"top_k": 1},
    "top_k_of_all": {"top_k": VOCAB + 7},
    "top_k_of_all_but_one": {"top_k": VOCAB - 1},
    "top_p": {"top_p": 0.6},
    "top_p_of_nearly_all": {"top_p": 0.9999, "temperature": 0.7},
    "top_p_of_one": {"top_p": 1e-6},
    "both": {"top_k": 40, "top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 60, "top_p": 0.95, "min_p": 0.02, "temperature": 1.7},
}
ROWS = {
    "random": (3 * rng.standard_normal(VOCAB)).astype(np.float32),
    "ties": rng.integers(0, 6, VOCAB).astype(np.float32),
    "masked": np.where(rng.random(VOCAB) < 0.9, -np.inf, 1).astype(np.float32),
}


@pytest.mark.parametrize(
    ("row", "case"),
    [("random", c) for c in CASES]
    + [(row, c) for row in ("ties", "masked") for c in ("plain", "top_k", "both", "all")],
)
def test_draws_have_the_hosts_distribution(kernels, row, case):
    params, logits = SamplingParams(**CASES[case]), ROWS[row]
    scaled = (logits - logits.max()) / np.float32(params.temperature)
    ids, weights = _candidates(scaled, params)
    expected = np.zeros(VOCAB)
    expected[slice(None) if ids is None else ids] = weights
    if row != "random" and params.top_k:
        # Of equal logits the host takes any, the device the first.
        last = expected > 0
        rank = np.argsort(-scaled, kind="stable")[: np.count_nonzero(last)]
        expected[:] = 0
        expected[rank] = np.exp(scaled[rank])
    count = 1000
    shares = np.random.default_rng(7).random((count, 2), np.float32)
    rows = np.zeros(count, np.int32)
    found = np.bincount(drawn(kernels, logits[None], rows, params, shares), minlength=VOCAB)
    expected *= count / expected.sum()
    assert not found[expected == 0].any()
    # Pearson's chi-square over tokens expected five times or more, and the others as one: its
    # mean is the number of classes, its variance twice that; five deviations are no chance.
    often = expected >= 5
    classes = [*zip(found[often], expected[often], strict=True)]
    if (rare := expected[~often].sum()) >= 5:
        classes.append((found[~often].sum(), rare))
    chi_square = sum((f - e) ** 2 / e for f, e in classes)
    assert chi_square < len(classes) + 5 * math.sqrt(2 * len(classes))


def test_a_rows_token_does_not_depend_on_the_other_rows(kernels):
    logits = rng.standard_normal((9, VOCAB)).astype(np.float32)
    shares = rng.random((9, 2))
    params = SamplingParams(top_k=50, top_p=0.9)
    together = drawn(kernels, logits, range(9), params, shares)
    for row in range(9):
        alone = drawn(kernels, logits[row : row + 1], [0], params, shares[row : row + 1])
        assert alone.tolist() == [together[row]]
    assert len(set(together.tolist())) > 4


def test_numbers_at_the_ends_draw_tokens_that_may_be_drawn(kernels):
    below_one = 1 - 2**-24
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[0, [3, 77, 200]] = 1
    ends = [[0, 0], [0, below_one], [below_one, 0], [below_one, below_one]]
    found = drawn(kernels, logits, [0] * 4, SamplingParams(), np.array(ends))
    assert found[0] == 3
    assert found[3] == 200
    assert set(found.tolist()) <= {3, 77, 200}
