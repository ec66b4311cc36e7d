"""What attention kernels of every target are tested with: shapes, ragged batches, numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from paged_reference import Array, Batch, attention, make_batch

# (new tokens, all tokens) of each sequence.
MIXED = ((1, 1), (1, 40), (1, 300), (0, 0), (5, 5), (70, 70), (33, 170), (2, 19), (0, 0))
SMALL = ((1, 33), (1, 7), (9, 30))

SEQUENCES = st.tuples(st.integers(0, 40), st.integers(0, 200)).map(
    lambda s: (s[0], s[0] + s[1] if s[0] else 0)
)
BATCHES = st.lists(SEQUENCES, min_size=1, max_size=6).filter(lambda s: any(n for n, _ in s))


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One attention and the batch it runs on; tokens is a kernel's fixed T."""

    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    v_head_dim: int = 64
    page_size: int = 16
    kv_dtype: str = "float32"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    group: int = 0
    num_groups: int = 1
    tokens: int | None = None
    dtype: str = "float32"
    lengths: tuple[tuple[int, int], ...] = SMALL

    @property
    def scale(self) -> float:
        """As usual."""
        return float(self.head_dim**-0.5)

    def arguments(self) -> dict[str, Any]:
        """What every target's `paged_attention` takes."""
        names = (
            *("num_heads", "num_kv_heads", "head_dim", "v_head_dim", "page_size", "kv_dtype"),
            *("scale", "window", "softcap", "sinks", "group", "num_groups", "tokens"),
        )
        return {name: getattr(self, name) for name in names}

    def batch(self, rng: np.random.Generator) -> Batch:
        """Its sequences over shuffled pages."""
        return make_batch(
            rng,
            list(self.lengths),
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            page_size=self.page_size,
            kv_dtype=self.kv_dtype,
            group=self.group,
            num_groups=self.num_groups,
            window=self.window,
        )

    def inputs(self) -> tuple[Array, Batch, Array | None]:
        """Queries `[1, T, H, D]`, their batch, and sinks where the case has them."""
        rng = np.random.default_rng(7)
        batch = self.batch(rng)
        shape = (1, int(batch.q_starts[-1]), self.num_heads, self.head_dim)
        queries = (3 * rng.standard_normal(shape)).astype(self.dtype)
        sinks = rng.standard_normal(self.num_heads).astype(np.float32) if self.sinks else None
        return queries, batch, sinks

    def expected(self, queries: Array, batch: Batch, sinks: Array | None) -> Array:
        """The reference's outputs."""
        return attention(
            queries,
            batch,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=sinks,
        )


# By what they try; heads that share nothing, all, or are of no usual size.
SHAPES: dict[str, dict[str, Any]] = {
    "mixed": {"lengths": MIXED},
    "mixed_f16": {"lengths": MIXED, "kv_dtype": "float16", "page_size": 32},
    "window_below_page": {"lengths": MIXED, "window": 5},
    "softcap": {"softcap": 3.0},
    "sinks_window_f16_second_group": {
        "sinks": True,
        "window": 20,
        "kv_dtype": "float16",
        "group": 1,
        "num_groups": 2,
    },
    "one_head_each": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "v_head_dim": 8},
    "one_shared_head": {"num_heads": 30, "num_kv_heads": 1, "head_dim": 16, "v_head_dim": 24},
    "many_shared_heads": {"num_heads": 64, "num_kv_heads": 1, "head_dim": 24, "v_head_dim": 16},
    "phi_heads": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 80, "v_head_dim": 96},
    "wide_heads": {"num_heads": 7, "num_kv_heads": 1, "head_dim": 256, "v_head_dim": 256},
    "odd_heads": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 5, "v_head_dim": 7},
    "one_token": {"tokens": 1, "lengths": ((1, 333),)},
    "one_token_of_many_sequences": {
        "tokens": 1,
        "lengths": ((0, 0), (1, 50), (0, 0)),
        "sinks": True,
    },
    "bf16": {"lengths": MIXED, "kv_dtype": "uint16"},
    "int8": {"lengths": MIXED, "kv_dtype": "int8"},
    "int8_heads_of_80": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 80,
        "v_head_dim": 24,
        "kv_dtype": "int8",
        "softcap": 4.0,
    },
}
