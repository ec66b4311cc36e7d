"""The contract between the engine and a compiled model: a ragged batch in, logits or tokens out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """The arguments of one step; docs/shapes.md explains each. All int32 and C-contiguous.

    Sequences with one new token come first; `num_decodes` counts them. T, S and L are at least 1.
    """

    input_ids: Int32  # [T]
    positions: Int32  # [T]
    q_starts: Int32  # [S+1]
    kv_lens: Int32  # [S]
    block_tables: Int32  # [G, S, B]
    slots: Int32  # [G, T]
    state_slots: Int32  # [S]
    logits_rows: Int32  # [L]
    num_decodes: int
    max_q_len: int
    max_kv_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Rows of a step's logits whose tokens the device chooses; R is at least 1.

    The columns of `settings` are 1 / temperature, top_p, the largest distance from the best logit
    (divided by the temperature) that min_p allows, and two uniform numbers in [0, 1).
    """

    rows: Int32  # [R], ascending indices of logits_rows
    top_k: Int32  # [R]; 0 = off, 1 = the likeliest token
    settings: Float32  # [R, 5]

    @property
    def function(self) -> str:
        """The artifact's function that does it, with the least work."""
        if (self.top_k == 1).all():
            return "choose_largest"
        limited = (self.top_k > 1) | ((self.settings[:, 1] < 1) & (self.top_k != 1))
        return "choose_limited" if limited.any() else "choose_drawn"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """Tokens that the device chose, and the logits of all other rows, in their order."""

    token_ids: Int32  # [L]; -1 where none was chosen, or the largest logit is no finite number
    logits: Float32  # [n, V] of the n rows with -1; valid until the next step


class BeginStep(Protocol):
    """Begins what `StepExecutor.step_and_choose` does; what is returned waits for it."""

    def __call__(
        self, inputs: StepInputs, draws: Draws, chosen: Int32 | None = None
    ) -> Callable[[], StepOutput]:
        """`chosen` `[T]`: instead of `inputs.input_ids`, which of the tokens that the step begun
        last chose are the input (0 in place of a -1).

        Where a step is followed so, its output has no logits, but NaN for rows without a token.
        Outputs are waited for in the order of the steps, at most one of them after the next step
        has begun.
        """


class StepExecutor(Protocol):
    """Runs steps on a device; owns the weights and the cache tensors."""

    chooses: bool
    """Whether the device can choose tokens."""
    begin: BeginStep | None
    """Where the device can run ahead of the host."""

    def step_and_choose(self, inputs: StepInputs, draws: Draws) -> StepOutput:
        """Runs a step and chooses tokens as `draws` says; only where `chooses`."""

    def step(self, inputs: StepInputs) -> Float32:
        """Returns logits `[L, V]` float32 for `inputs.logits_rows`; valid until the next call."""
