"""The tunable numbers of the CPU kernels, one table, one row per instruction set."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from llmc.errors import UnsupportedError
from llmc.formats import WeightFormat
from llmc.targets.cpu.kernels.attention_tile import AttentionTuning, MatrixTuning
from llmc.targets.cpu.kernels.byte_dot import (
    PMADDUBSW_256,
    PMADDUBSW_512,
    SDOT,
    VPDPBUSD_256,
    VPDPBUSD_512,
    ByteDot,
)
from llmc.targets.cpu.kernels.byte_table import PSHUFB_256, PSHUFB_512, TBL, ByteTable


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearParameters:
    """How a product is tiled; every value changes speed only.

    The tile of `token_tiles[0]` tokens by `16 · tile_panels` outputs is what lives in registers, so
    it has to leave room for `tile_panels` weight vectors and one broadcast. Remaining tokens take
    the next smaller tiles; the last has to be 1.
    """

    tile_panels: int  # panels (16 outputs each) a task unpacks and multiplies together
    token_tiles: tuple[int, ...]  # tokens of one register tile, largest first, ending in 1
    fused: bool  # decode weights in registers for each token tile, not once for all tokens
    k_block: int  # input features unpacked at a time: k_block · tile_panels · 64 bytes of scratch
    row_block: int  # tokens a task multiplies by weights it unpacked once
    gemv_words: int  # stored words per step of a fused product's inner loop
    prefetch_words: int  # word vectors (64 bytes each) a fused product asks for ahead
    serial_weights: int  # fused products of at most so many weights stay on the calling thread
    table: ByteTable  # decides no numbers: each instruction set has one
    interleaved: bool = False  # rows of a token tile are first put beside each other

    def __post_init__(self) -> None:
        tiles = self.token_tiles
        assert tiles[-1] == 1, tiles
        assert not self.interleaved or self.row_block % tiles[0] == 0, self
        assert list(tiles) == sorted(set(tiles), reverse=True), tiles
        assert min(self.tile_panels, self.k_block, self.row_block, self.gemv_words) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How a product is cut into register tiles and tasks; every value changes speed only.

    A tile of `token_tiles[i]` tokens by `16 · panels` outputs keeps its sums in registers.
    """

    panels: int
    token_tiles: tuple[int, ...]  # largest first, ending in 1
    one_token_panels: int = 1  # in place of `panels` where there is one token
    ahead_words: int = 128  # word vectors (64 bytes each) then asked for ahead; 0: none
    words: int = 1  # stored words of one step of several tokens' integers
    sums_in_memory: bool = False  # several tokens' float sums, which leaves integers the registers
    row_block_bytes: int = 393216  # activations that a task meets again in the L2 cache
    serial_weights: int = 65536  # products of one token with fewer weights start no threads

    def __post_init__(self) -> None:
        tiles = self.token_tiles
        assert tiles[-1] == 1, tiles
        assert list(tiles) == sorted(set(tiles), reverse=True), tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class TileParameters:
    """How products of many rows use matrix registers (kernels/tile_tasks.py)."""

    crossover: int  # products of more tokens than this use them
    rows: int = 256  # of a task, at most: weights are unpacked once for all of them
    panels: int = 16  # of a task, at most: activations are read once for all of them
    min_columns: int = 8  # tasks that a matrix' rows are shared out to, at least
    steps: int = 18  # tiles' depths that are multiplied before sums go to memory
    ahead: int = 32  # least steps of a chunk that is unpacked while the one before is multiplied


@dataclass(frozen=True, slots=True, kw_only=True)
class FewTokens:
    """How products of a few rows use matrix registers."""

    first: int  # products of at least so many tokens use them
    last: int  # and of at most so many
    panels: int = 8  # of a task, at most
    min_columns: int = 8  # tasks that a matrix' rows are shared out to, at least


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTileParameters(FewTokens):
    """By codes as they are (kernels/code_tiles.py)."""

    streams: int = 4  # places at which a row of weights is read, of 1, 2 and 4
    ahead: int = 4  # units of a stream asked for before they are unpacked

    def __post_init__(self) -> None:
        assert self.streams in (1, 2, 4), self  # a turn of the loop is one of four


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedTileParameters(FewTokens):
    """By codes times sub-scales (kernels/nested_tiles.py)."""

    ahead: int = 4  # steps of 64 features asked for before they are unpacked
    ahead_cache: int = 2  # the level from which on caches take them


@dataclass(frozen=True, slots=True, kw_only=True)
class FewTileParameters:
    """How products of at most sixteen rows use matrix registers (kernels/bfloat16_few.py)."""

    first: int  # products of at least so many tokens use them
    panels: int = 16  # of a task, at most
    min_columns: int = 8  # tasks that a matrix' rows are shared out to, at least
    ahead: int = 4  # tiles of each panel asked for ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerParameters:
    """Products of quantized activations; `block` decides numbers, the rest speed."""

    dot: ByteDot
    table: ByteTable
    block: int = 32  # activation features that share a scale, or a weight group if that is larger
    tiling: Tiling = field(default_factory=lambda: Tiling(panels=2, token_tiles=(6, 4, 3, 2, 1)))
    composed: Tiling | None = None  # in its place for formats that are put together
    chunked: Tiling | None = None  # of these, for more tokens than fit a tile
    whole: Tiling | None = None  # and for codes that lie in memory as bytes
    min_chains: int = 4  # independent sums below which a tile splits each in two
    unit_words: int = 4  # stored words of one step of a one-token product
    chunk: int = 512  # features that are put together at a time where there are many rows
    chunk_rows: int = 192  # for so many of them, at most
    ahead_cache: int = 1  # the level that words asked for ahead for one token are brought to
    next_cache: int = 2  # to which tiles of several tokens bring the panels that follow
    tiles: TileParameters | None = None  # None: there are no matrix registers
    byte_tiles: TileParameters | None = None  # in their place, for what these take
    code_tiles: CodeTileParameters | None = None
    nested_tiles: NestedTileParameters | None = None  # in their place, for what these take
    avx512_gate: bool = False  # activations as precise as what they are rounded to

    def of(self, fmt: WeightFormat) -> IntegerParameters:
        """Those for a format: of tilings `tiling`, and `chunked` if the format is put together."""
        tiling = self.composed if fmt.is_composed else self.whole if fmt.bits == 8 else None
        tiling = tiling or self.tiling
        chunked = (self.chunked or tiling) if fmt.is_composed else None
        return replace(self, tiling=tiling, chunked=chunked, composed=None, whole=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bfloat16Parameters:
    """Products of bfloat16 activations and weights, summed in float32; all values change speed
    only.
    """

    # Rows often lie a multiple of 4 KiB apart: more than eight drive each other out of the cache.
    tiling: Tiling = field(default_factory=lambda: Tiling(panels=4, token_tiles=(6, 4, 2, 1)))
    chains: int = 8  # independent sums that hide the latency of a dot product
    words: int = 4  # stored words of one step of a one-token product
    chunk: int = 2048  # features of many rows that are multiplied at a time, about
    next_cache: int = 2
    tiles: TileParameters | None = None  # None: there are no matrix registers
    few_tiles: FewTileParameters | None = None  # where `tiles` are not used
    avx512_gate: bool = False  # as above


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """Choosing tokens from logits (kernels/argmax.py, draw.py): multiples of 16."""

    part: int = 8192  # logits that a thread searches for the largest at a time
    block: int = 512  # logits that are passed over together, and weighed together


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuParameters:
    """Tunables of one instruction set: `linear` for any number of tokens, `few` for at most 8.

    `integer` and `bfloat16` are None where the instruction set has no dot products of such pairs.
    """

    linear: LinearParameters
    few: LinearParameters
    integer: IntegerParameters | None = None
    bfloat16: Bfloat16Parameters | None = None
    attention: AttentionTuning = field(default_factory=AttentionTuning)
    sampling: SamplingParameters = field(default_factory=SamplingParameters)


def _vectors(linear: LinearParameters, few_tiles: tuple[int, ...]) -> CpuParameters:
    """An instruction set's float products: with few tokens weights are decoded for each tile."""
    few = replace(linear, token_tiles=few_tiles, fused=True, row_block=8)
    return CpuParameters(linear=linear, few=few)


# 32 vector registers of 16 floats: 8 x 2 accumulators already reach 90 % of the multiply-add rate.
_AVX512 = _vectors(
    LinearParameters(
        tile_panels=2,
        token_tiles=(8, 4, 1),
        fused=False,
        k_block=256,
        row_block=192,
        gemv_words=4,
        prefetch_words=128,
        serial_weights=65536,
        table=PSHUFB_512,
    ),
    few_tiles=(4, 2, 1),
)
_INTEGER = IntegerParameters(
    dot=VPDPBUSD_512,
    table=PSHUFB_512,
    # What a tile of one panel takes stays in registers.
    composed=Tiling(panels=1, token_tiles=(8, 6, 4, 3, 2, 1), words=4),
    chunked=Tiling(panels=2, token_tiles=(4, 3, 2, 1), words=8),
)
_VNNI = replace(_AVX512, integer=_INTEGER)
# For one token AMD's processors read four panels side by side, best by their own foresight.
_AMD_INTEGER = replace(_INTEGER, whole=replace(_INTEGER.tiling, one_token_panels=4, ahead_words=0))
_AMD_BFLOAT16 = Bfloat16Parameters(
    tiling=Tiling(panels=4, token_tiles=(6, 4, 2, 1), one_token_panels=4, ahead_words=0)
)
_BF16 = replace(
    _VNNI,
    integer=_AMD_INTEGER,
    bfloat16=_AMD_BFLOAT16,
    attention=AttentionTuning(bf16_dot=True, rounds=True),
)

# 16 registers of 8 floats, of which a panel takes two: 6 x 2 accumulators.
_AVX2 = replace(
    _vectors(
        LinearParameters(
            tile_panels=1,
            token_tiles=(6, 2, 1),
            fused=False,
            k_block=512,
            row_block=192,
            gemv_words=2,
            prefetch_words=128,
            serial_weights=65536,
            table=PSHUFB_256,
            interleaved=True,
        ),
        few_tiles=(2, 1),
    ),
    attention=AttentionTuning(accumulators=6, strip_rows=3, few_accumulators=6, few_strip_rows=6),
)
# 32 registers of 4 floats, of which a panel takes four: 6 x 4 accumulators.
_NEON = replace(
    _AVX2,
    linear=replace(_AVX2.linear, k_block=256, interleaved=False, table=TBL),
    few=replace(_AVX2.few, table=TBL),
)


def _narrow(
    dot: ByteDot,
    table: ByteTable,
    token_tiles: tuple[int, ...],
    *,
    words: int = 1,
    sums_in_memory: bool = False,
) -> IntegerParameters:
    """Products of one panel at a time, where sums and codes take most of the registers."""
    tiling = Tiling(panels=1, token_tiles=token_tiles, words=words, sums_in_memory=sums_in_memory)
    return IntegerParameters(dot=dot, table=table, tiling=tiling)


PARAMETERS: dict[str, CpuParameters] = {
    "amx": replace(
        _BF16,
        integer=replace(
            _INTEGER,
            ahead_cache=2,
            tiles=TileParameters(crossover=24),
            byte_tiles=TileParameters(crossover=16, steps=32),
            code_tiles=CodeTileParameters(first=9, last=16),
            nested_tiles=NestedTileParameters(first=9, last=16),
            avx512_gate=True,
        ),
        bfloat16=Bfloat16Parameters(
            tiling=Tiling(panels=4, token_tiles=(6, 4, 2, 1), one_token_panels=4, ahead_words=32),
            tiles=TileParameters(crossover=16),
            few_tiles=FewTileParameters(first=4),
            avx512_gate=True,
        ),
        # Dot products of bfloat16 pairs take such processors longer than those of floats.
        attention=AttentionTuning(matrix=MatrixTuning()),
    ),
    # A first-level cache of 48 KiB has room for what is read next.
    "avx512vp2intersect": replace(
        _BF16,
        integer=replace(_AMD_INTEGER, next_cache=1),
        bfloat16=replace(_AMD_BFLOAT16, next_cache=1),
    ),
    "avx512bf16": _BF16,
    "avx512vnni": _VNNI,
    "avx512": replace(
        _AVX512, integer=_narrow(PMADDUBSW_512, PSHUFB_512, (8, 4, 3, 2, 1), words=8)
    ),
    "avxvnni": replace(_AVX2, integer=_narrow(VPDPBUSD_256, PSHUFB_256, (4, 3, 2, 1))),
    "avx2": replace(
        _AVX2,
        integer=_narrow(PMADDUBSW_256, PSHUFB_256, (4, 3, 2, 1), words=8, sums_in_memory=True),
    ),
    "neon-dotprod": replace(_NEON, integer=_narrow(SDOT, TBL, (4, 3, 2, 1))),
    "neon": _NEON,
}


def parameters_for(isa: str) -> CpuParameters:
    """The row of `isa`; raises UnsupportedError where there is none."""
    try:
        return PARAMETERS[isa]
    except KeyError:
        raise UnsupportedError(
            f"no CPU kernel parameters for instruction set {isa!r}",
            hint=f"choose one of {', '.join(sorted(PARAMETERS))}",
        ) from None
