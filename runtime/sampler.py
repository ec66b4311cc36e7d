"""Chooses one sequence's next token from its row of logits.

Each sequence has a sampler with a random stream of its own and rows are treated one by one, so a
request's tokens cannot depend on its batch. A row costs one pass for greedy; nothing is sorted that
selection has not first made short. Work on a row is O(V) in NumPy and outweighs the calls, so
batching rows would gain nothing.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from llmc.runtime.logprobs import largest
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.step import Float32, Int32

_GREEDY_BELOW = 1e-5  # temperatures this low leave one token in float32
_BLOCK = 512  # weights that are summed at once
_BELOW_ONE = math.nextafter(1.0, 0.0)
_BELOW_ONE_F32 = 1 - 2**-24
_PARTS = 2**24  # of [0, 1), as many as a float32 tells apart
_ANY_DISTANCE = 1e30
Float64 = npt.NDArray[np.float64]
Weights = Float32 | Float64
Indices = npt.NDArray[np.intp]
Draw = tuple[int, tuple[float, float, float, float, float]]
"""A row's top_k and settings, as runtime/step.py's Draws has them."""


class TokenSampler:
    """The sampling state of one sequence."""

    def __init__(
        self, params: SamplingParams, prompt: Int32, *, index: int, stop_ids: Iterable[int]
    ) -> None:
        """`index` tells a request's choices apart; `stop_ids` are not sampled before min_tokens."""
        self._params = params
        self._index = index
        self._num_sampled = 0
        self._stop_ids = np.array(sorted(stop_ids), np.intp)
        self._bias_ids = np.array(list(params.logit_bias), np.intp)
        self._biases = np.array(list(params.logit_bias.values()), np.float32)
        self._penalties = _Penalties(params, prompt) if _has_penalties(params) else None

    @cached_property
    def _random(self) -> np.random.Generator:
        """The sequence's stream; a greedy one does without NumPy's generators, 2.5 MiB."""
        given = self._params.seed
        seed = secrets.randbits(64) if given is None else given % 2**64
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, self._index])))

    def sample(self, logits: Float32) -> int:
        """The next token's id, from `logits` `[V]` float32, which is left as it is.

        ValueError where the logits hold NaN or +inf: no token can be chosen from them.
        """
        logits = self._adjusted(logits)
        best = int(logits.argmax())  # NumPy's argmax finds a NaN first
        if not math.isfinite(logits[best]):
            raise ValueError(f"the logits' maximum is {logits[best]}")
        if self._params.temperature < _GREEDY_BELOW:
            token_id = best
        else:
            scaled = (logits - logits[best]) / np.float32(self._params.temperature)
            token_id = self._draw(*_candidates(scaled, self._params))
        self.note(token_id)
        return token_id

    def draw(self) -> Draw | None:
        """What a device needs to know to choose the next token; None where the host has to see the
        logits. `note` takes what it chose.

        It takes one number of the random stream for a token that is sampled, as `sample` does.
        """
        params = self._params
        if self._changes_logits():
            return None
        if params.temperature < _GREEDY_BELOW:
            return 1, (1.0, 1.0, _ANY_DISTANCE, 0.0, 0.0)
        # Of one number's 53 bits, the first decide on a part of the row, the others on the place.
        rest, part = math.modf(self._random.random() * _PARTS)
        farthest = -math.log(params.min_p) if params.min_p > 0 else _ANY_DISTANCE
        shares = part / _PARTS, min(rest, _BELOW_ONE_F32)
        return params.top_k, (1 / params.temperature, params.top_p, farthest, *shares)

    def note(self, token_id: int) -> None:
        """Counts a token that was chosen."""
        self._num_sampled += 1
        if self._penalties is not None:
            self._penalties.count(token_id)

    def _adjusted(self, logits: Float32) -> Float32:
        """`logits` with bias, penalties and the minimum length applied; a copy where it changes."""
        if not self._changes_logits():
            return logits
        logits = logits.copy()
        if self._penalties is not None:
            self._penalties.apply(logits)
        logits[self._bias_ids] += self._biases
        if self._hides_stops():
            logits[self._stop_ids] = -np.inf
        return logits

    def _changes_logits(self) -> bool:
        return self._penalties is not None or self._bias_ids.size > 0 or self._hides_stops()

    def _hides_stops(self) -> bool:
        return self._num_sampled < self._params.min_tokens and self._stop_ids.size > 0

    def _draw(self, ids: Indices | None, weights: Weights) -> int:
        """One of `ids` (None: all), as likely as its weight, by one uniform number."""
        # First the block, then the place in it: a running sum over a whole vocabulary costs ten
        # times as much as a sum of each block.
        starts = np.arange(0, len(weights), _BLOCK)
        block, rest = _pick(
            np.add.reduceat(weights, starts, dtype=np.float64), self._random.random()
        )
        start = int(starts[block])
        index = start + _pick(weights[start : start + _BLOCK], rest)[0]
        return index if ids is None else int(ids[index])


def _pick(weights: Weights, share: float) -> tuple[int, float]:
    """Where `share` of the total weight is reached, and the share of that place's own weight.

    `share` is in [0, 1). The place has a weight: its running sum exceeds the one before.
    """
    sums = np.cumsum(weights, dtype=np.float64)
    point = min(share * sums[-1], np.nextafter(sums[-1], 0))
    index = int(np.searchsorted(sums, point, side="right"))
    below = sums[index - 1] if index else 0.0
    return index, min(float((point - below) / (sums[index] - below)), _BELOW_ONE)


def _candidates(scaled: Float32, params: SamplingParams) -> tuple[Indices | None, Weights]:
    """Tokens that may be drawn and their weights, from logits over temperature whose maximum is 0.

    Returns ids `[n]` (None: the whole vocabulary) and weights `[n]`.
    """
    vocab_size = len(scaled)
    if 0 < params.top_k < vocab_size:
        ids: Indices = largest(scaled, params.top_k)
        weights: Weights = np.exp(scaled[ids], dtype=np.float64)
        if params.top_p < 1:
            count = _nucleus(weights, params.top_p * weights.sum())
            ids, weights = ids[:count], weights[:count]
    elif params.top_p < 1:
        ids, weights = _largest_until(scaled, params.top_p)
    elif params.min_p > 0:
        ids = np.flatnonzero(scaled >= math.log(params.min_p))
        return ids, np.exp(scaled[ids], dtype=np.float64)
    else:
        return None, np.exp(scaled)
    if params.min_p > 0:
        likely = weights >= params.min_p  # of a maximum of 1
        ids, weights = ids[likely], weights[likely]
    return ids, weights


def _largest_until(scaled: Float32, top_p: float) -> tuple[Indices, Float32]:
    """The fewest likeliest tokens whose weights reach the share `top_p` of all, by id."""
    weights = np.exp(scaled)
    total = float(weights.sum(dtype=np.float64))
    wanted = top_p * total
    # All tokens below this weight together cannot make up the rest: they are never needed.
    ids = np.flatnonzero(weights >= (total - wanted) / len(weights))
    weights = weights[ids]
    # Sorting values is many times quicker than sorting indices.
    descending = np.sort(weights)[::-1]
    count = _nucleus(descending, wanted)
    chosen = weights >= descending[count - 1]
    surplus = int(np.count_nonzero(chosen)) - count
    if surplus:  # of tokens as likely as the last one, the first are taken
        chosen[np.flatnonzero(weights == descending[count - 1])[-surplus:]] = False
    return ids[chosen], weights[chosen]


def _nucleus(weights: Weights, wanted: float) -> int:
    """How many of the descending `weights` it takes to reach `wanted`; at least one."""
    return min(int(np.searchsorted(np.cumsum(weights, dtype=np.float64), wanted)) + 1, len(weights))


def _has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    )


class _Penalties:
    """Tokens seen so far, each once, with how often it was generated.

    Repetition as in CTRL (Keskar et al. 2019): positive logits are divided, negative multiplied.
    Presence and frequency as in the OpenAI API. Kept up to date token by token; a step costs NumPy
    work only.
    """

    def __init__(self, params: SamplingParams, prompt: Int32) -> None:
        self._params = params
        self._ids = np.unique(prompt).astype(np.intp)
        self._counts = np.zeros(len(self._ids), np.float32)
        self._place = {int(token_id): i for i, token_id in enumerate(self._ids)}

    def count(self, token_id: int) -> None:
        """Notes a generated token."""
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            room = max(16, len(self._ids))
            self._ids = np.append(self._ids, np.zeros(room, np.intp))
            self._counts = np.append(self._counts, np.zeros(room, np.float32))
        self._ids[place] = token_id
        self._counts[place] += 1

    def apply(self, logits: Float32) -> None:
        """Changes `logits` `[V]` in place."""
        seen = len(self._place)
        ids, counts = self._ids[:seen], self._counts[:seen]
        values = logits[ids]
        factor = np.float32(self._params.repetition_penalty)
        values = np.where(values > 0, values / factor, values * factor)
        values -= np.float32(self._params.frequency_penalty) * counts
        values -= np.float32(self._params.presence_penalty) * (counts > 0)
        logits[ids] = values
