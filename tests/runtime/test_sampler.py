"""The sampler draws from exactly the distribution that its parameters describe."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.logprobs import largest, token_logprob
from llmc.runtime.sampler import TokenSampler
from llmc.runtime.sampling_params import SamplingParams

VOCAB = 2000


def logits_of(seed: int, vocab_size: int = VOCAB, scale: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(vocab_size) * scale).astype(np.float32)


def sampler(params: SamplingParams, prompt: tuple[int, ...] = (1,), index: int = 0, stops=()):
    return TokenSampler(params, np.array(prompt, np.int32), index=index, stop_ids=stops)


def brute_force(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution `[V]` by full sorts in float64."""
    scaled = logits.astype(np.float64) / params.temperature
    order = np.argsort(-scaled, kind="stable")
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    full = probs.copy()
    if params.top_k:
        probs[order[params.top_k :]] = 0
        probs /= probs.sum()
    if params.top_p < 1:
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= params.top_p]] = 0
    probs[full < params.min_p * full.max()] = 0
    return probs / probs.sum()


def drawn(logits: np.ndarray, params: SamplingParams, count: int) -> np.ndarray:
    one = sampler(params)
    return np.bincount([one.sample(logits) for _ in range(count)], minlength=len(logits))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.6},
        {"top_p": 0.999, "temperature": 4.0},  # nearly all tokens
        {"min_p": 0.2},
        {"top_k": 12, "top_p": 0.8},
        {"top_k": 30, "min_p": 0.05},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.1, "temperature": 1.7},
        {"top_p": 0.9, "min_p": 0.15},
    ],
    ids=str,
)
def test_frequencies_match_the_distribution(options):
    params = SamplingParams(seed=3, **options)
    logits = logits_of(1)
    expected = brute_force(logits, params)
    count = 4000
    counts = drawn(logits, params, count)
    assert counts[expected == 0].sum() == 0
    # Five standard deviations for each token: one in a million fails by chance, the seed is fixed.
    deviation = np.sqrt(count * expected * (1 - expected))
    assert (np.abs(counts - count * expected) <= 5 * deviation + 2).all()


@given(
    seed=st.integers(0, 100),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.05, 20),
)
@settings(max_examples=150, deadline=None)
def test_only_tokens_of_the_distribution_are_drawn(seed, top_k, top_p, min_p, temperature):
    params = SamplingParams(
        seed=seed, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature
    )
    logits = logits_of(seed, 300)
    # Float32 against float64 may move the border by one token; a margin of 1e-5 covers it.
    wider = SamplingParams(
        top_k=top_k,
        top_p=min(1.0, top_p + 1e-5),
        min_p=max(0.0, min_p - 1e-5),
        temperature=temperature,
    )
    allowed = set(np.flatnonzero(brute_force(logits, wider)).tolist())
    one = sampler(params)
    assert {one.sample(logits) for _ in range(20)} <= allowed


def test_greedy_takes_the_first_maximum_and_leaves_the_logits_alone():
    logits = logits_of(2)
    logits[[40, 900]] = 50
    before = logits.copy()
    greedy = SamplingParams(temperature=0, repetition_penalty=1.1, logit_bias={5: 1.0})
    assert sampler(greedy).sample(logits) == 40
    assert sampler(SamplingParams(temperature=0)).sample(logits) == 40
    np.testing.assert_array_equal(logits, before)


def test_tiny_temperatures_are_greedy():
    logits = logits_of(2)
    for temperature in (1e-300, 1e-6, 1e-4):
        assert sampler(SamplingParams(temperature=temperature)).sample(logits) == logits.argmax()


def test_a_seed_fixes_the_stream_and_choices_differ():
    logits = logits_of(4, scale=0.1)
    streams = {}
    for seed, index in [(1, 0), (1, 1), (2, 0), (-1, 0)]:
        one, again = (sampler(SamplingParams(seed=seed), index=index) for _ in range(2))
        streams[seed, index] = [one.sample(logits) for _ in range(10)]
        assert streams[seed, index] == [again.sample(logits) for _ in range(10)]
    assert len({tuple(s) for s in streams.values()}) == 4
    unseeded = [[s.sample(logits) for _ in range(10)] for s in (sampler(SamplingParams()),) * 2]
    assert unseeded[0] != unseeded[1]


def test_penalties_follow_their_formulas():
    logits = np.linspace(-2, 2, 50, dtype=np.float32)
    params = SamplingParams(
        temperature=0, repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5
    )
    prompt = (49, 3, 3)
    one = sampler(params, prompt)
    generated: list[int] = []
    for _ in range(60):
        expected = logits.astype(np.float64)
        for token in {*prompt, *generated}:
            value = expected[token]
            value = value / 1.5 if value > 0 else value * 1.5
            count = generated.count(token)
            expected[token] = value - 0.5 * count - 0.25 * (count > 0)
        token = one.sample(logits)
        # The choice is the maximum up to float32 rounding.
        assert expected[token] == pytest.approx(expected.max(), abs=1e-5)
        generated.append(token)
    assert len(set(generated)) > 5


def test_logit_bias_forces_and_forbids():
    logits = logits_of(5)
    assert sampler(SamplingParams(temperature=0, logit_bias={17: 100})).sample(logits) == 17
    best = int(logits.argmax())
    for _ in range(20):
        assert sampler(SamplingParams(logit_bias={best: -100})).sample(logits) != best


def test_stop_tokens_are_hidden_until_the_minimum_length():
    logits = np.zeros(10, np.float32)
    logits[4] = 9
    one = sampler(SamplingParams(temperature=0, min_tokens=2), stops=[4])
    assert [one.sample(logits) == 4 for _ in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(value, temperature):
    logits = logits_of(6)
    logits[100] = value
    with pytest.raises(ValueError, match="maximum"):
        sampler(SamplingParams(temperature=temperature)).sample(logits)


def test_top_p_takes_no_more_of_equal_tokens_than_it_needs():
    logits = np.zeros(400, np.float32)
    counts = drawn(logits, SamplingParams(seed=1, top_p=0.01), 300)
    assert set(np.flatnonzero(counts)) == {0, 1, 2, 3}


def test_masked_logits_are_never_drawn():
    logits = np.full(100, -np.inf, np.float32)
    logits[[3, 99]] = 1
    counts = drawn(logits, SamplingParams(seed=1), 200)
    assert set(np.flatnonzero(counts)) == {3, 99}


@given(seed=st.integers(0, 1000), count=st.integers(1, 60))
def test_largest_is_the_head_of_a_stable_sort(seed, count):
    values = np.random.default_rng(seed).permutation(50).astype(np.float32)
    np.testing.assert_array_equal(
        largest(values, count), np.argsort(-values, kind="stable")[:count]
    )


def test_logprobs_are_log_softmax():
    logits = logits_of(8, 50_000)
    exact = logits.astype(np.float64)
    exact -= exact.max() + np.log(np.exp(exact - exact.max()).sum())
    entry = token_logprob(logits, 123, 5)
    # float32 exp has a relative error of 1e-7, and so has the sum's logarithm in absolute terms.
    assert entry.logprob == pytest.approx(exact[123], abs=2e-6)
    assert [i for i, _ in entry.top] == np.argsort(-exact)[:5].tolist()
    assert token_logprob(logits, 123, 0).top == ()
