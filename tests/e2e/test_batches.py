"""A request's tokens do not depend on its company: batches, chunks and preemptions, in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from greedy import Answer, assert_same, greedy

from llmc.runtime.engine import Engine

NUM_REQUESTS = 32
MAX_TOKENS = 24


def mixed_prompts(engine: Engine, longest: int) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens in no order."""
    random = np.random.default_rng(3)
    lengths = random.permutation(np.linspace(1, longest, NUM_REQUESTS).astype(int))
    vocab_size = engine.manifest.model.vocab_size
    return [random.integers(0, vocab_size, length).tolist() for length in lengths]


class Alone:
    """One artifact's answers to prompts that were sent one after the other."""

    def __init__(self, artifact: Path, longest: int) -> None:
        self.artifact = artifact
        engine = Engine(artifact)
        self.prompts = mixed_prompts(engine, longest)
        self.answers: list[Answer] = []
        for prompt in self.prompts:
            self.answers += greedy(engine, [prompt], max_tokens=MAX_TOKENS)

    def compare(self, **options: int) -> Engine:
        """Sends all prompts at once to a new engine, which must give the same answers."""
        engine = Engine(self.artifact, **options)
        together = greedy(engine, self.prompts, max_tokens=MAX_TOKENS)
        assert_same(together, self.answers, least_certain=0.8)
        assert engine.stats.kv_cache_usage_ratio == 0
        return engine


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("tiny_artifact", 90), id="tiny"),
        pytest.param(("demo_f32", 150), id="demo", marks=pytest.mark.slow),
    ],
)
def alone(request: pytest.FixtureRequest) -> Alone:
    name, longest = request.param
    return Alone(request.getfixturevalue(name), longest)


def test_a_full_batch_answers_as_one_request_after_the_other(alone: Alone) -> None:
    stats = alone.compare().stats
    # 32 requests one after the other would take a step a token.
    assert stats.num_steps_total < NUM_REQUESTS * MAX_TOKENS / 4


def test_preempted_requests_answer_as_if_nothing_had_happened(alone: Alone) -> None:
    longest = max(len(prompt) for prompt in alone.prompts) + MAX_TOKENS
    stats = alone.compare(kv_cache_tokens=2 * longest).stats
    assert stats.num_preemptions_total > 0


@pytest.mark.parametrize("max_batch_tokens", [33, 8, 3])
def test_a_prompt_in_chunks_is_a_whole_prompt(alone: Alone, max_batch_tokens: int) -> None:
    """33 mixes decodes with parts of prompts; 8 and 3 go through another entry point."""
    engine = alone.compare(max_batch_tokens=max_batch_tokens)
    num_tokens = sum(len(prompt) for prompt in alone.prompts)
    assert engine.stats.num_steps_total > num_tokens / max_batch_tokens


def test_logits_do_not_depend_on_the_size_of_chunks(alone: Alone) -> None:
    engine = Engine(alone.artifact)
    prompt = max(alone.prompts, key=len)
    whole = engine.logits(prompt, chunk_tokens=len(prompt))
    scale = np.abs(whole).max()
    for chunk_tokens in (1, 5, 8, 13, 32):
        # Sums of up to 1,536 float32 products in another order, through all layers.
        found = engine.logits(prompt, chunk_tokens=chunk_tokens)
        np.testing.assert_allclose(found, whole, rtol=0, atol=2e-5 * scale)
