"""Greedy answers and how far they can be compared: up to the first near tie."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.runtime.engine import Engine
from llmc.runtime.sampling_params import SamplingParams

# Logits of one request differ between batches and step sizes by the order of float32 sums; where
# the best two are closer than this, either may win, and the tokens after it go their own ways.
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and before each of them the difference of the top two logits."""

    token_ids: list[int]
    margins: list[float]

    @property
    def num_certain(self) -> int:
        """Tokens before the first near tie."""
        ties = (index for index, margin in enumerate(self.margins) if margin <= NEAR_TIE)
        return next(ties, len(self.margins))


def greedy(engine: Engine, prompts: list[list[int]], *, max_tokens: int) -> list[Answer]:
    """Answers all prompts at once."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=2)
    answers = []
    for output in engine.generate(prompts, params):
        tops = [token.top for token in output.logprobs]
        margins = [best[1] - second[1] for best, second in tops]
        answers.append(Answer(output.token_ids, margins))
    return answers


def assert_same(found: list[Answer], expected: list[Answer], *, least_certain: float) -> None:
    """Equal tokens up to the first near tie; `least_certain`: the share that must be compared."""
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert len(ours.token_ids) == len(theirs.token_ids)
        certain = theirs.num_certain
        assert ours.token_ids[:certain] == theirs.token_ids[:certain], f"prompt {index}"
    compared = sum(answer.num_certain for answer in expected)
    assert compared >= least_certain * sum(len(answer.token_ids) for answer in expected)
