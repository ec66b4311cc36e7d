"""Makes `reference.json`: what transformers says, in float32, on the compiled weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from llmc.compiler.streamed_model import StreamedModel, Values
from llmc.models.source import ModelSource
from llmc.reference import Reference, ReferencePrompt

PROMPT_TOKENS = 40
TOP_K = 5
_TEXTS = (
    "The quick brown fox jumps over the lazy dog. It was a bright cold day in April, and "
    "the clocks were striking thirteen. Nobody in the street had noticed anything strange "
    "about the weather.",
    "Water boils at 100 degrees Celsius at sea level, because its vapour pressure then "
    "equals that of the air around it. On a mountain the pressure is lower, so that the "
    "water boils sooner than that.",
    "def fibonacci(n):\n"
    "    a, b = 0, 1\n"
    "    for _ in range(n):\n"
    "        a, b = b, a + b\n"
    "    return a\n\n\n"
    "print([fibonacci(i) for i in range(10)])\n"
    "# The sum of the first ten numbers of the series is 88\n",
    "1, 2, 3, 5, 8, 13, 21, 34. In 1969 two people walked on the Moon; Berlin, Paris and "
    "Rome are the capitals of Germany, France and Italy. The answer to the question is "
    "therefore quite simple:",
)


def make_reference(
    source: ModelSource, dequantized: Values, original: Values | None, vocab_size: int
) -> Reference:
    """Scores the prompts with the dequantized weights and, where they differ, the original ones."""
    ids = _prompts(source, vocab_size)
    logprobs = _logprobs(source, ids, dequantized)
    order = np.argsort(-logprobs, axis=-1, kind="stable")[..., :TOP_K]
    top = np.take_along_axis(logprobs, order, axis=-1)
    first = None
    if original is not None:
        first = np.take_along_axis(_logprobs(source, ids, original), order, axis=-1)
    positions = list(range(ids.shape[1]))
    return Reference(
        made=True,
        prompts=[
            ReferencePrompt(
                token_ids=ids[i].tolist(),
                positions=positions,
                top_ids=order[i].tolist(),
                top_logprobs=_rounded(top[i]),
                original_top_logprobs=None if first is None else _rounded(first[i]),
            )
            for i in range(len(ids))
        ],
    )


def _rounded(values: npt.NDArray[np.float32]) -> list[list[float]]:
    return [[round(float(v), 6) for v in row] for row in values]


def _prompts(source: ModelSource, vocab_size: int) -> npt.NDArray[np.int64]:
    """Prompts of equal length `[n, PROMPT_TOKENS]`: texts, or seeded ids without a tokenizer."""
    if source.tokenizer_json is not None:
        tokenizer = Tokenizer.from_str(source.tokenizer_json.decode("utf-8"))
        encoded = [tokenizer.encode(text).ids[:PROMPT_TOKENS] for text in _TEXTS]
        length = min(len(e) for e in encoded)
        prompts = np.array([e[:length] for e in encoded], np.int64)
        if length > 1 and prompts.max() < vocab_size:
            return prompts
    return np.random.default_rng(0).integers(0, vocab_size, (len(_TEXTS), PROMPT_TOKENS))


def _logprobs(
    source: ModelSource, ids: npt.NDArray[np.int64], values: Values
) -> npt.NDArray[np.float32]:
    """Log-probabilities `[n, T, V]` float32 of the reference implementation."""
    logits = StreamedModel(source, values).logits(ids)
    logprobs: npt.NDArray[np.float32] = torch.log_softmax(logits, dim=-1).numpy()
    return logprobs
