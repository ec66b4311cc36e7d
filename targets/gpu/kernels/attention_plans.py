"""How the blocks of paged attention are used: the table's numbers within a device's limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmc.targets.gpu.kernels.attention_inputs import Shape
from llmc.targets.gpu.layout import ceildiv
from llmc.targets.gpu.parameters import AttentionParameters, Features

ACROSS = 16
"""Threads of a tile across positions, then across features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """How a block is used."""

    heads: int  # query heads of a block
    threads: int
    steps: int  # positions that a thread scores before values are weighed
    lanes: int  # features of V that a thread has
    parts: int  # blocks that share a context
    features: Features

    @classmethod
    def of(cls, shape: Shape, params: AttentionParameters, features: Features) -> DecodePlan:
        """As the table says, within the device's limits."""
        heads = max(h for h in range(1, params.decode_heads + 1) if shape.heads % h == 0)
        lanes = 4 if shape.v_head_dim % 4 == 0 else 1
        columns = ceildiv(shape.v_head_dim // lanes, 32) * 32
        threads = max(params.decode_threads, columns)
        return cls(
            heads=heads,
            threads=threads,
            steps=params.decode_steps,
            lanes=lanes,
            parts=params.decode_parts,
            features=features,
        )

    @property
    def positions(self) -> int:
        """Positions scored at a time."""
        return self.threads * self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan:
    """How a block is used."""

    heads: int  # query heads of a tile
    tokens: int
    positions: int
    threads: int
    stage_features: int  # of keys in the stage
    stage_positions: int  # of values in the stage
    stage_floats: int

    @classmethod
    def of(cls, shape: Shape, params: AttentionParameters, features: Features) -> TilePlan:
        """As the table says; fewer rows where queries would not leave room for the rest."""
        rows_limit, positions = params.tile_rows, params.tile_positions
        row_threads = params.tile_threads // ACROSS
        padded = ceildiv(shape.v_head_dim, ACROSS) * ACROSS
        stage = max(params.stage_floats, padded, positions * 4)

        def floats(rows: int) -> int:
            # Besides, the block has one float a thread.
            return rows * (shape.keys.padded + positions + 1) + stage + params.tile_threads

        while rows_limit > row_threads and 4 * floats(rows_limit) > features.shared_bytes:
            rows_limit -= row_threads
        heads = max(h for h in range(1, rows_limit + 1) if shape.heads % h == 0)
        divisors = [d for d in range(4, shape.keys.padded + 1, 4) if shape.keys.padded % d == 0]
        return cls(
            heads=heads,
            tokens=rows_limit // heads,
            positions=positions,
            threads=params.tile_threads,
            stage_features=max(d for d in divisors if d * positions <= stage),
            stage_positions=min(positions, stage // padded),
            stage_floats=stage,
        )

    @property
    def rows(self) -> int:
        """Rows with work."""
        return self.heads * self.tokens

    @property
    def row_threads(self) -> int:
        """Threads across rows."""
        return self.threads // ACROSS

    @property
    def thread_rows(self) -> int:
        """Rows of a thread; the last ones may stand for nothing."""
        return ceildiv(self.rows, self.row_threads)

    @property
    def row_lanes(self) -> int:
        """Rows of a thread that lie side by side, so that it reads them at once."""
        return math.gcd(self.thread_rows, 4)

    @property
    def position_lanes(self) -> int:
        """Positions likewise."""
        return math.gcd(self.positions // ACROSS, 4)

    @property
    def padded_rows(self) -> int:
        """Rows that threads compute."""
        return self.thread_rows * self.row_threads
