"""Log-probabilities of tokens under the model's own distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.runtime.step import Float32


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's natural-log probability and the likeliest tokens `(id, logprob)`, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: Float32, token_id: int, num_top: int) -> TokenLogprob:
    """`log_softmax(logits)` of `token_id` and of the `num_top` likeliest; `logits` `[V]`.

    The sum runs in float64: over 150,000 terms float32 would lose the fourth digit.
    """
    top_logit = logits.max()
    log_sum = float(top_logit) + float(np.log(np.exp(logits - top_logit).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ids = largest(logits, num_top)
        top = tuple((int(i), float(logits[i]) - log_sum) for i in ids)
    return TokenLogprob(token_id, float(logits[token_id]) - log_sum, top)


def largest(values: Float32, count: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Indices of the `count` largest of `values` `[n]`, largest first, equal ones by index."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    # Selection first: sorting a whole vocabulary costs ten times as much.
    ids = np.sort(np.argpartition(values, -count)[-count:])
    return ids[np.argsort(-values[ids], kind="stable")]
