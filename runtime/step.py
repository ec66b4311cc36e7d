"""The contract between the engine and a compiled model: one ragged batch in, logits out."""

from __future__ import annotations

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


class StepExecutor(Protocol):
    """Runs steps on a device; owns the weights and the cache tensors."""

    def step(self, inputs: StepInputs) -> Float32:
        """Returns logits `[L, V]` float32 for `inputs.logits_rows`; valid until the next call."""
