"""Perplexity over a text, by the same rule as llama.cpp's `perplexity`, so that figures compare.

The text is tokenized whole and cut into windows of `window` tokens that do not overlap; a rest is
dropped. In each window the first half is context, the tokens of the second half are scored. Where
the tokenizer begins a text with the model's first token (BOS), every window begins with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmc.errors import UsageError, VerifyError

if TYPE_CHECKING:
    from llmc.runtime.engine import Engine

_ROWS = 64  # scored at once: float64 copies of a whole step could be gigabytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """The figures of one text."""

    num_windows: int
    num_scored_tokens: int
    perplexity: float
    standard_error: float  # of the perplexity
    nats_per_token: float
    bits_per_byte: float  # bits per token · tokens of the text / its UTF-8 bytes


def perplexity(
    engine: Engine, text: str, *, window: int, on_window: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Scores `text`; `on_window(done, of)` is called after each window.

    Raises UsageError where the artifact has no tokenizer, the window does not fit the model or the
    text is shorter than one window.
    """
    if engine.tokenizer is None:
        raise UsageError("the artifact has no tokenizer, so it cannot read a text")
    context = engine.manifest.model.context_length
    if not 4 <= window <= context:
        raise UsageError(f"--window {window}: expected 4 to {context} tokens, the model's context")
    token_ids = engine.tokenizer.encode(text)
    num_windows = len(token_ids) // window
    if num_windows == 0:
        raise UsageError(
            f"the text has {len(token_ids)} tokens, fewer than one window of {window}",
            hint="give a longer text or a smaller --window",
        )
    bos = engine.manifest.model.bos_token_id
    begins_with_bos = bos is not None and token_ids[0] == bos
    losses: list[npt.NDArray[np.float64]] = []
    first = window // 2
    for index in range(num_windows):
        ids = token_ids[index * window : (index + 1) * window]
        if begins_with_bos and bos is not None:
            ids[0] = bos
        # Position p's logits predict token p + 1; the window's last position predicts nothing.
        for start, logits in engine.iter_logits(ids):
            scored = max(first, start)
            targets = ids[scored + 1 : start + len(logits) + 1]
            losses.append(token_losses(logits[scored - start :], targets))
        if on_window is not None:
            on_window(index + 1, num_windows)
    return _summarize(np.concatenate(losses), num_windows, len(token_ids), len(text.encode()))


def token_losses(logits: npt.NDArray[np.float32], token_ids: list[int]) -> npt.NDArray[np.float64]:
    """Negative log-likelihoods `[n]` in nats of `token_ids` `[n]`; logits `[T, V]`, T ≥ n."""
    targets = np.asarray(token_ids, dtype=np.intp)
    losses = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS):
        end = min(start + _ROWS, len(targets))
        rows = logits[start:end].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        chosen = rows[np.arange(end - start), targets[start:end]]
        losses[start:end] = np.log(np.exp(rows).sum(axis=1)) - chosen
    return losses


def _summarize(
    losses: npt.NDArray[np.float64], num_windows: int, num_tokens: int, num_bytes: int
) -> Perplexity:
    mean = float(losses.mean())
    if not math.isfinite(mean):
        raise VerifyError(
            "the model gave NaN or infinite logits", hint="run `llmc verify` on the artifact"
        )
    value = math.exp(mean)
    deviation = float(losses.std(ddof=1)) if len(losses) > 1 else 0.0
    return Perplexity(
        num_windows=num_windows,
        num_scored_tokens=len(losses),
        perplexity=value,
        # By the delta method: d exp(x) = exp(x) dx.
        standard_error=value * deviation / math.sqrt(len(losses)),
        nats_per_token=mean,
        bits_per_byte=mean / math.log(2) * num_tokens / num_bytes,
    )
