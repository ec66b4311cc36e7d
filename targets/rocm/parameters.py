"""The tunable numbers of ROCm's kernels and the families of its devices: tables.

No device was at hand: the numbers keep within registers and shared memory, they are not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from llmc.targets.gpu.parameters import AttentionParameters, Features, GemvParameters, GpuParameters
from llmc.targets.rocm.kernels.matrix_instruction import MFMA, SIDE, WMMA, MatrixInstruction
from llmc.targets.rocm.statements import MAX_THREADS


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixTile:
    """Rows by tokens of a block; a wavefront has 16 · row_tiles rows and all tokens."""

    tokens: int
    row_tiles: int = 2
    waves: int = 1  # side by side, each with rows of its own
    splits: int = 1  # wavefronts that share the features of the same rows
    depth: int = 1  # of the smallest steps of features at a time
    shared: bool = False  # activations go through shared memory

    def __post_init__(self) -> None:
        assert self.tokens % SIDE == 0, self
        assert self.splits == 1 or not self.shared, self

    @property
    def rows(self) -> int:
        """Output rows of a block."""
        return SIDE * self.row_tiles * self.waves

    @property
    def token_tiles(self) -> int:
        """Tokens by 16."""
        return self.tokens // SIDE


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixPlan:
    """Kernels by rising numbers of tokens: each with the most it serves, the last serves all."""

    instruction: MatrixInstruction
    steps: tuple[tuple[int, MatrixTile], ...]
    last: MatrixTile
    experts: MatrixTile

    def __post_init__(self) -> None:
        assert all(a[0] < b[0] for a, b in pairwise(self.steps)), self

    @property
    def kernels(self) -> list[MatrixTile]:
        """Those of projections, in order."""
        return [*(tile for _, tile in self.steps), self.last]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Architectures that run the same kernels."""

    architectures: tuple[str, ...]
    matrix: MatrixPlan

    @property
    def features(self) -> Features:
        """What kernels may use; the reductions are those of device_functions.ll."""
        width = self.matrix.instruction.wavefront
        return Features(
            subgroup=width,
            subgroup_extern=(f"llmc_sum{width}", f"llmc_maximum{width}"),
            max_threads=MAX_THREADS,
            shared_bytes=65536,
        )


_STEPS = (
    (16, MatrixTile(tokens=16, splits=8)),
    (64, MatrixTile(tokens=64, splits=4)),
)
FAMILIES = (
    Family(
        architectures=("gfx90a", "gfx942"),
        matrix=MatrixPlan(
            instruction=MFMA,
            steps=_STEPS,
            last=MatrixTile(tokens=128, waves=4, shared=True),
            experts=MatrixTile(tokens=64, waves=4, shared=True),
        ),
    ),
    Family(
        architectures=("gfx1100",),
        matrix=MatrixPlan(
            instruction=WMMA,
            steps=_STEPS,
            last=MatrixTile(tokens=64, waves=4, depth=2, shared=True),
            experts=MatrixTile(tokens=64, waves=4, depth=2, shared=True),
        ),
    ),
)

# As on NVIDIA's large GPUs, which have fewer, wider processors than AMD's.
PARAMETERS = GpuParameters(
    gemv=GemvParameters(splits=32, panels=1),
    few=GemvParameters(splits=8),
    # With 128 threads a tile of attention spills registers.
    attention=AttentionParameters(decode_parts=16, tile_threads=256),
)
