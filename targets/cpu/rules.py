"""Which kernel a CPU uses for which operator: the first rule that returns one decides."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from llmc import dialect
from llmc.formats import FORMATS
from llmc.targets.base import Kernel, KernelRule, Site
from llmc.targets.cpu.kernels.activation import gated_activation
from llmc.targets.cpu.kernels.attention import paged_attention
from llmc.targets.cpu.kernels.attention_tile import AttentionTuning
from llmc.targets.cpu.kernels.bfloat16_linear import bfloat16_linear, round_activations
from llmc.targets.cpu.kernels.embedding import embedding
from llmc.targets.cpu.kernels.grouped_linear import grouped_linear
from llmc.targets.cpu.kernels.integer_grouped_linear import integer_grouped_linear
from llmc.targets.cpu.kernels.integer_linear import integer_linear
from llmc.targets.cpu.kernels.kv_write import kv_write
from llmc.targets.cpu.kernels.linear import linear
from llmc.targets.cpu.kernels.norm import add_rms_norm, layer_norm, narrow_rms_norm, rms_norm
from llmc.targets.cpu.kernels.outputs import Gated, Output, Quantized, Rounded
from llmc.targets.cpu.kernels.quantize_activations import quantize_activations
from llmc.targets.cpu.kernels.rope import rope, rope_kv_write
from llmc.targets.cpu.kernels.top_k import top_k
from llmc.targets.cpu.parameters import (
    Bfloat16Parameters,
    CodeTileParameters,
    CpuParameters,
    FewTileParameters,
    IntegerParameters,
    LinearParameters,
    NestedTileParameters,
    TileParameters,
)

Expr = Any
Few = TypeVar("Few", CodeTileParameters, NestedTileParameters, FewTileParameters)


def kernel_rules(parameters: CpuParameters, few_tokens: int) -> list[tuple[str, KernelRule]]:
    """The rules in the order they are tried, each with the name that `llmc inspect` shows."""

    def gemv(site: Site) -> Kernel | None:
        return _linear(site, parameters.linear) if site.tokens == 1 else None

    def few(site: Site) -> Kernel | None:
        return _linear(site, parameters.few) if site.max_tokens <= few_tokens else None

    def gemm(site: Site) -> Kernel | None:
        return _linear(site, parameters.linear)

    def integer(site: Site) -> Kernel | None:
        return _integer_linear(site, parameters.integer)

    def bfloat16(site: Site) -> Kernel | None:
        return _bfloat16_linear(site, parameters.bfloat16)

    def experts(site: Site) -> Kernel | None:
        if not isinstance(site.op, dialect.GroupedLinear):
            return None
        num_experts, m, k = site.extents("weight")
        rows = [str(site.types[n].shape[0]) for n in ("x", "expert_ids")]
        top = site.extents("expert_ids")[1]
        func = grouped_linear(
            FORMATS[site.op.format or "f32"],
            num_experts,
            m,
            k,
            top,
            per_token_input=rows[0] == rows[1],
            bias="bias" in site.types,
            params=parameters.few,
        )
        return Kernel.of(func, site, ("x", "expert_ids", "weight", "bias"))

    def integer_experts(site: Site) -> Kernel | None:
        return _integer_grouped_linear(site, parameters.integer)

    def attention(site: Site) -> Kernel | None:
        return _attention(site, parameters.attention)

    return [
        ("cpu.gemv", gemv),
        ("cpu.few", few),
        ("cpu.gemm", gemm),
        ("cpu.integer", integer),
        ("cpu.bfloat16", bfloat16),
        ("cpu.quantize", _quantize_activations),
        ("cpu.round", _round_activations),
        ("cpu.experts", experts),
        ("cpu.integer_experts", integer_experts),
        ("cpu.attention", attention),
        ("cpu.embedding", _embedding),
        ("cpu.norm", _norm),
        ("cpu.rope", _rope),
        ("cpu.kv_write", _kv_write),
        ("cpu.gated_activation", _gated_activation),
        ("cpu.top_k", _top_k),
    ]


def _linear(site: Site, params: LinearParameters) -> Kernel | None:
    if not isinstance(site.op, dialect.Linear):
        return None
    m, k = site.extents("weight")
    rows = site.types["x"].shape[1]
    func = linear(
        FORMATS[site.op.format or "f32"],
        m,
        k,
        1 if site.tokens == 1 and int(rows) == 1 else None,
        bias="bias" in site.types,
        residual="residual" in site.types,
        in_place=site.residual_ends,
        params=params,
    )
    return Kernel.of(func, site, ("x", "weight", "bias", "residual"), _over_residual(site))


def _over_residual(site: Site) -> tuple[str | None]:
    """What the output of a product is written over."""
    return ("residual" if site.residual_ends else None,)


def _integer_linear(site: Site, params: IntegerParameters | None) -> Kernel | None:
    op = site.op
    if not isinstance(op, dialect.IntegerLinear | dialect.GatedIntegerLinear) or params is None:
        return None
    params = replace(
        params,
        tiles=_tiles(site, params.tiles),
        byte_tiles=_tiles(site, params.byte_tiles),
        code_tiles=_few_tiles(site, params.code_tiles),
        nested_tiles=_few_tiles(site, params.nested_tiles),
    )
    m, k = site.extents("weight")
    rows = site.types["codes"].shape[1]
    gate = None
    if isinstance(op, dialect.GatedIntegerLinear):
        gate = partial(_quantized_gate, op, m // 2, params.avx512_gate)
    func = integer_linear(
        FORMATS[op.format],
        m,
        k,
        1 if site.tokens == 1 and int(rows) == 1 else None,
        block=op.block,
        bias="bias" in site.types,
        residual="residual" in site.types,
        in_place=site.residual_ends,
        params=params,
        gate=gate,
    )
    operands = ("codes", "scales", "sums", "weight", "bias", "residual")
    outputs = _over_residual(site) if gate is None else (None,) * 3
    return Kernel.of(func, site, operands, outputs)


def _quantized_gate(
    op: dialect.GatedIntegerLinear, features: int, avx512: bool, count: Expr
) -> Gated:
    output = Quantized.arguments(
        count, features, block=op.out_block, unit=op.out_unit, factor=op.out_factor
    )
    return Gated(kind=op.kind, output=output, avx512=avx512)


def _integer_grouped_linear(site: Site, params: IntegerParameters | None) -> Kernel | None:
    if not isinstance(site.op, dialect.IntegerGroupedLinear) or params is None:
        return None
    if site.tokens == 1:  # each expert has one row at most
        params = params.of(FORMATS[site.op.format])
        tiling = replace(params.tiling, panels=params.tiling.one_token_panels)
        params = replace(params, tiling=tiling)
    num_experts, m, k = site.extents("weight")
    tokens, top_k = site.types["expert_ids"].shape
    func = integer_grouped_linear(
        FORMATS[site.op.format],
        num_experts,
        m,
        k,
        int(top_k),
        per_token_input=str(site.types["codes"].shape[1]) == str(tokens),
        block=site.op.block,
        bias="bias" in site.types,
        params=params,
    )
    return Kernel.of(func, site, ("codes", "scales", "sums", "expert_ids", "weight", "bias"))


def _tiles(site: Site, tiles: TileParameters | None) -> TileParameters | None:
    """None where the entry point takes too few tokens for matrix registers."""
    return tiles if tiles is not None and site.max_tokens > tiles.crossover else None


def _few_tiles(site: Site, tiles: Few | None) -> Few | None:
    """Likewise."""
    return tiles if tiles is not None and site.max_tokens >= tiles.first else None


def _bfloat16_linear(site: Site, params: Bfloat16Parameters | None) -> Kernel | None:
    op = site.op
    if not isinstance(op, dialect.Bfloat16Linear | dialect.GatedBfloat16Linear) or params is None:
        return None
    params = replace(
        params, tiles=_tiles(site, params.tiles), few_tiles=_few_tiles(site, params.few_tiles)
    )
    m, k = site.extents("weight")
    gate = None
    if isinstance(op, dialect.GatedBfloat16Linear):
        gate = partial(_rounded_gate, op, m // 2, params.avx512_gate)
    func = bfloat16_linear(
        m,
        k,
        1 if site.tokens == 1 and int(site.types["x"].shape[1]) == 1 else None,
        bias="bias" in site.types,
        residual="residual" in site.types,
        in_place=site.residual_ends,
        params=params,
        gate=gate,
    )
    return Kernel.of(func, site, ("x", "weight", "bias", "residual"), _over_residual(site))


def _rounded_gate(
    op: dialect.GatedBfloat16Linear, features: int, avx512: bool, count: Expr
) -> Gated:
    return Gated(kind=op.kind, output=Rounded.arguments(count, features), avx512=avx512)


def _round_activations(site: Site) -> Kernel | None:
    if not isinstance(site.op, dialect.RoundActivations):
        return None
    return Kernel.of(round_activations(site.extents("x")[2]), site, ("x",))


def _quantize_activations(site: Site) -> Kernel | None:
    op = site.op
    if not isinstance(op, dialect.QuantizeActivations):
        return None
    [_, rows, features] = site.extents("x")
    func = quantize_activations(
        features=features, block=op.block, unit=op.unit, factor=op.factor, tokens=rows or None
    )
    return Kernel.of(func, site, ("x",), (None, None, None))


def _attention(site: Site, tuning: AttentionTuning) -> Kernel | None:
    op = site.op
    if not isinstance(op, dialect.PagedAttention):
        return None
    if op.factors != "bfloat16":
        tuning = replace(tuning, matrix=None, rounds=False)
    _, _, heads, head_dim = site.extents("query")
    func = paged_attention(
        num_heads=heads,
        num_kv_heads=site.extents("k_pages")[1],
        head_dim=head_dim,
        v_head_dim=op.v_head_dim,
        page_size=site.page_size,
        kv_dtype=str(site.types["k_pages"].dtype),
        scale=op.scale,
        window=op.window,
        softcap=op.softcap,
        sinks="sinks" in site.types,
        group=op.group,
        num_groups=site.num_groups,
        tokens=site.tokens,
        tuning=tuning,
    )
    return Kernel.of(func, site, (*type(op).operands[:-1], "sinks"))


def _narrow(
    op: dialect.QuantizedRmsNorm | dialect.RoundedRmsNorm, features: int, count: Expr
) -> Output:
    if isinstance(op, dialect.RoundedRmsNorm):
        return Rounded.arguments(count, features)
    return Quantized.arguments(count, features, block=op.block, unit=op.unit, factor=op.factor)


def _embedding(site: Site) -> Kernel | None:
    if not isinstance(site.op, dialect.Embedding):
        return None
    v, e = site.extents("weight")
    func = embedding(FORMATS[site.op.format or "f32"], v, e)
    return Kernel.of(func, site, ("ids", "weight"))


def _norm(site: Site) -> Kernel | None:
    op = site.op
    if isinstance(op, dialect.RmsNorm):
        extents = site.extents("x")
        func = rms_norm(
            features=extents[-1],
            eps=op.eps,
            weight_offset=op.offset,
            heads=extents[2] if len(extents) == 4 else None,
            tokens=site.tokens,
        )
        return Kernel.of(func, site, ("x", "weight"))
    if isinstance(op, dialect.QuantizedRmsNorm | dialect.RoundedRmsNorm):
        features = site.extents("x")[2]
        quantized = isinstance(op, dialect.QuantizedRmsNorm)
        func = narrow_rms_norm(
            features=features,
            eps=op.eps,
            weight_offset=op.offset,
            output=partial(_narrow, op, features),
            tokens=site.extents("x")[1] or None,
        )
        return Kernel.of(func, site, ("x", "weight"), (None,) * (3 if quantized else 1))
    if isinstance(op, dialect.AddRmsNorm):
        func = add_rms_norm(
            features=site.extents("x")[-1],
            eps=op.eps,
            weight_offset=op.offset,
            tokens=site.tokens,
        )
        return Kernel.of(func, site, ("x", "residual", "weight"), (None, None))
    if isinstance(op, dialect.LayerNorm):
        func = layer_norm(features=site.extents("x")[-1], eps=op.eps, bias=True, tokens=site.tokens)
        return Kernel.of(func, site, ("x", "weight", "bias"))
    return None


def _rope(site: Site) -> Kernel | None:
    op = site.op
    if isinstance(op, dialect.Rope):
        _, _, heads, head_dim = site.extents("x")
        func = rope(heads=heads, head_dim=head_dim, rotary_dim=op.rotary_dim, tokens=site.tokens)
        return Kernel.of(func, site, ("x", "cos", "sin"))
    if isinstance(op, dialect.RopeKvWrite):
        func = rope_kv_write(
            num_heads=op.num_heads,
            num_kv_heads=op.num_kv_heads,
            head_dim=op.head_dim,
            v_head_dim=op.v_head_dim,
            rotary_dim=op.rotary_dim,
            interleaved=False,
            page_size=site.page_size,
            kv_dtype=str(site.types["k_pages"].dtype),
            group=op.group,
            num_groups=site.num_groups,
            tokens=site.tokens,
        )
        return Kernel.of(func, site, type(op).operands, (None, "k_pages", "v_pages"))
    return None


def _kv_write(site: Site) -> Kernel | None:
    if not isinstance(site.op, dialect.KvWrite):
        return None
    _, _, kv_heads, head_dim = site.extents("key")
    func = kv_write(
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=site.extents("value")[3],
        page_size=site.page_size,
        kv_dtype=str(site.types["k_pages"].dtype),
        group=site.op.group,
        num_groups=site.num_groups,
        tokens=site.tokens,
    )
    return Kernel.of(func, site, type(site.op).operands, ("k_pages", "v_pages"))


def _gated_activation(site: Site) -> Kernel | None:
    if not isinstance(site.op, dialect.GatedActivation):
        return None
    inner = site.extents("x")[-1] // 2
    return Kernel.of(
        gated_activation(inner=inner, kind=site.op.kind, tokens=site.tokens), site, ("x",)
    )


def _top_k(site: Site) -> Kernel | None:
    if not isinstance(site.op, dialect.TopK):
        return None
    func = top_k(columns=site.extents("x")[1], k=site.op.k)
    return Kernel.of(func, site, ("x",), (None, None))
