"""What is known of an attention layer at compile time, and the shapes that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmc.targets.cpu.kernels.bfloat16 import DOT_LANES
from llmc.targets.cpu.kernels.kv_pages import KvType, MatrixShape, key_matrix, value_matrix
from llmc.targets.cpu.kernels.vector import lanes_of

LOWEST = -3.0e38  # below every score, and finite: LOWEST - LOWEST is 0, not NaN
LOG2E = math.log2(math.e)
MATRIX_ROWS = 32  # that pass matrix registers together
MATRIX_DEPTH = 32  # of a product: features of scores, tokens of outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixTuning:
    """Attention of two tokens or more in matrix registers (attention_matrix.py)."""

    rows: int = 128  # query rows (tokens times heads of a group) that share unpacked K and V
    block_tokens: int = 64  # K/V tokens between two rescalings


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTuning:
    """Sizes that fit the machine; the defaults suit 32 vector registers of 512 bits.

    Where there are 16 registers of 256 bits (AVX2), 12 accumulators of two registers each are best.
    """

    accumulators: int = 24  # vectors of 16 float32 kept in registers by one inner loop
    strip_rows: int = 6  # most query rows of a register tile
    few_rows: int = 16  # most query rows of a tile that reads K and V as they lie in pages
    few_accumulators: int = 16  # such a tile's: enough to hide latency
    few_strip_rows: int = 16  # most query rows of its register tiles
    tile_rows: int = 48  # most query rows (tokens times heads of a group) of a tile
    block_tokens: int = 128  # K/V tokens between two rescalings
    few_block_bytes: int = 16_384  # the same of a tile of few rows: K/V of one head
    ahead_cache: int = 2  # pages are asked for into this level of the caches
    work_items: int = 64  # parts that a step's contexts are cut into, if they are long enough
    part_bytes: int = 131_072  # K/V of one head that are worth a part of their own
    soften_lines: int = 3  # one of so many lines of the next keys is asked for while rows soften
    serial_bytes: int = 262_144  # K/V of a layer that one thread reads sooner than others wake up
    bf16_dot: bool = False  # multiply bfloat16 and int8 K/V in bfloat16, summed in float32
    rounds: bool = False  # and float16 where K/V are unpacked, which rounds it
    matrix: MatrixTuning | None = None  # None: no matrix registers, or not for this product


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One attention layer."""

    num_kv_heads: int
    heads: int  # query heads of one K/V head
    head_dim: int
    v_head_dim: int
    page_size: int
    kv: KvType
    scale: float
    window: int | None
    softcap: float | None
    group: int
    tuning: AttentionTuning

    @property
    def keys(self) -> MatrixShape:
        """A head's keys in a page."""
        return key_matrix(self.kv, self.head_dim, self.page_size)

    @property
    def values(self) -> MatrixShape:
        """A head's values in a page."""
        return value_matrix(self.kv, self.v_head_dim, self.page_size)

    @property
    def page_lanes(self) -> int:
        """Lanes of scores: they divide a page."""
        return lanes_of(self.page_size)

    @property
    def value_lanes(self) -> int:
        """Lanes of outputs: they divide a value."""
        return lanes_of(self.v_head_dim)

    def block_pages(self, tile: Tile) -> int:
        """Pages between two rescalings; of few rows a power of two, so that vectors pass evenly."""
        if not tile.few:
            return max(1, self.tuning.block_tokens // self.page_size)
        fitting = max(2, self.tuning.few_block_bytes // self.page_bytes)
        return 1 << fitting.bit_length() - 1

    @property
    def page_bytes(self) -> int:
        """Bytes of one head's keys and values in a page."""
        return self.keys.num_bytes + self.values.num_bytes

    @property
    def serial_pages(self) -> int:
        """Pages, all heads counted, that one thread walks alone."""
        return self.tuning.serial_bytes // self.page_bytes

    @property
    def part_pages(self) -> int:
        """Fewest pages of a part of a context."""
        return max(1, self.tuning.part_bytes // self.page_bytes)

    @property
    def max_splits(self) -> int:
        """Bound on the parts of all split contexts, for one K/V head.

        A context is split into ceil(n / share) parts where n > share, which is less than
        2 · n / share, and share is at least the sum of all n over work_items / Kv.
        """
        return 2 * -(-self.tuning.work_items // self.num_kv_heads)

    @property
    def query_scale(self) -> float:
        """Queries are scaled once: scores are in units of log2, or of a softcap."""
        return self.scale * LOG2E if self.softcap is None else self.scale / self.softcap

    def tile(self, tokens: int) -> Tile:
        """A tile of `tokens` tokens in strips of equal height."""
        rows = tokens * self.heads
        few = rows <= self.tuning.few_rows
        num_strips = -(-rows // (self.tuning.few_strip_rows if few else self.tuning.strip_rows))
        unpack = not few and self.kv.dtype != "float32"
        in_bf16 = self.kv.scaled or self.tuning.rounds
        bf16 = self._can_dot() and (self.kv.unit == 2 or (unpack and in_bf16))
        return Tile(
            tokens=tokens,
            strip=-(-rows // num_strips),
            num_strips=num_strips,
            few=few,
            bf16=bf16,
            unpack=unpack and not (bf16 and self.kv.unit == 2),
        )

    def _can_dot(self) -> bool:
        lanes = {self.page_lanes, self.value_lanes, DOT_LANES}
        return self.tuning.bf16_dot and len(lanes) == 1 and self.head_dim % 2 == 0

    def prefill_tile(self) -> Tile:
        """The tile with the fewest padded rows; the larger one among equals."""
        most = max(1, self.tuning.tile_rows // self.heads)
        tiles = [self.tile(tokens) for tokens in range(max(1, most // 2), most + 1)]
        return min(tiles, key=lambda t: (t.rows / (t.tokens * self.heads), -t.tokens))

    def many(self, tokens: int | None) -> Tile | MatrixTile:
        """The tile of sequences with several tokens, where a batch has `tokens` (None: any)."""
        if tokens == 1:
            return self.tile(1)
        if self.matrix is None:
            return self.prefill_tile()
        return MatrixTile(tokens=max(2, self.matrix.rows // self.heads), heads=self.heads)

    @property
    def matrix(self) -> MatrixTuning | None:
        """How matrix registers are used; None where they are not, or nothing fits them."""
        matrix = self.tuning.matrix
        sizes = (self.head_dim, self.v_head_dim, 2 * self.page_lanes)
        if matrix is None or any(size % MATRIX_DEPTH for size in sizes):
            return None
        return None if matrix.block_tokens % self.page_size else matrix

    @property
    def unit_pages(self) -> int:
        """Parts of a context have a multiple of so many pages, but for the last."""
        return 1 if self.matrix is None else self.matrix.block_tokens // self.page_size

    def vectors_at_once(self, tile: Tile, num_vectors: int) -> int:
        """The largest divisor of num_vectors whose accumulators fit in registers."""
        tuning = self.tuning
        most = tuning.few_accumulators if tile.few else tuning.accumulators
        fitting = max(1, most // tile.strip)
        return max(n for n in range(1, min(fitting, num_vectors) + 1) if num_vectors % n == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Rows of a tile (tokens times heads, padded) walked `strip` rows at once in registers."""

    tokens: int
    strip: int
    num_strips: int
    few: bool  # see AttentionTuning.few_rows
    bf16: bool  # products of bfloat16 pairs
    unpack: bool  # K and V are converted once for all strips

    @property
    def rows(self) -> int:
        """Rows with padding."""
        return self.strip * self.num_strips

    @property
    def unit(self) -> int:
        """Features (of scores) or tokens (of outputs) in one step of a product, once unpacked."""
        return 2 if self.bf16 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixTile:
    """Rows of a tile that is multiplied in matrix registers, MATRIX_ROWS of them together."""

    tokens: int
    heads: int

    @property
    def rows(self) -> int:
        """Rows with padding."""
        return -(-self.tokens * self.heads // MATRIX_ROWS) * MATRIX_ROWS
