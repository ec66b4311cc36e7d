"""Which kernel a GPU uses for which operator: the first rule that returns one decides.

All GPU targets share these rules; a target that has something better puts its own in front.
"""

from __future__ import annotations

from collections.abc import Callable

from llmc import dialect
from llmc.formats import FORMATS, WeightFormat
from llmc.targets.base import Kernel, KernelRule, Site
from llmc.targets.gpu.kernels.activation import gated_activation
from llmc.targets.gpu.kernels.attention import Emit, paged_attention
from llmc.targets.gpu.kernels.embedding import embedding
from llmc.targets.gpu.kernels.gemm import MultiplyTile, TileShape, multiply_tile
from llmc.targets.gpu.kernels.grouped_linear import grouped_linear
from llmc.targets.gpu.kernels.grouped_tiles import FloatTile, Tile, grouped_tiles
from llmc.targets.gpu.kernels.kv_pages import key_shape, kv_type, value_shape
from llmc.targets.gpu.kernels.kv_write import kv_write, rope, rope_kv_write
from llmc.targets.gpu.kernels.linear import linear_few, linear_many
from llmc.targets.gpu.kernels.norm import add_rms_norm, layer_norm, rms_norm
from llmc.targets.gpu.kernels.top_k import top_k
from llmc.targets.gpu.layout import num_chunks
from llmc.targets.gpu.parameters import GemvParameters, GpuParameters

_Rule = Callable[[Site, GpuParameters], Kernel | None]


def key_page(kv_heads: int, head_dim: int, kv_dtype: str, page_size: int) -> list[int]:
    """Shape of a page of keys: `[Kv, elements]`, as kernels/kv_pages.py lays them out."""
    return [kv_heads, key_shape(kv_type(kv_dtype), head_dim, page_size).elements]


def value_page(kv_heads: int, head_dim: int, kv_dtype: str, page_size: int) -> list[int]:
    """Shape of a page of values, likewise."""
    return [kv_heads, value_shape(kv_type(kv_dtype), head_dim, page_size).elements]


def kernel_rules(parameters: GpuParameters, few_tokens: int) -> list[tuple[str, KernelRule]]:
    """The rules in the order they are tried, each with the name that `llmc inspect` shows."""

    def gemv(site: Site) -> Kernel | None:
        op = site.op
        if not isinstance(op, dialect.Linear) or site.tokens != 1 or int(site.extents("x")[1]) != 1:
            return None
        chunks = num_chunks(FORMATS[op.format or "f32"], site.extents("weight")[1])
        return _linear_few(site, 1, parameters.gemv.within(chunks))

    def few(site: Site) -> Kernel | None:
        if not isinstance(site.op, dialect.Linear) or _max_rows(site) > few_tokens:
            return None
        return _linear_few(site, None, parameters.few)

    def few_experts(site: Site) -> Kernel | None:
        return _grouped_linear(site, parameters) if site.max_tokens <= few_tokens else None

    rules = _rules(parameters)
    return [("gpu.gemv", gemv), ("gpu.few", few), ("gpu.few_experts", few_experts), *rules]


def _max_rows(site: Site) -> int:
    """The largest number of rows of a projection."""
    return site.extents("x")[1] or site.max_tokens


def _rules(parameters: GpuParameters) -> list[tuple[str, KernelRule]]:
    def bound(rule: _Rule) -> KernelRule:
        return lambda site: rule(site, parameters)

    named: list[tuple[str, _Rule]] = [
        ("gpu.gemm", lambda site, params: linear_tiles(site, params.gemm)),
        ("gpu.experts", lambda site, params: expert_tiles(site, FloatTile(params.gemm))),
        ("gpu.attention", attention_kernel),
        ("gpu.embedding", _embedding),
        ("gpu.norm", _norm),
        ("gpu.rope", _rope),
        ("gpu.kv_write", _kv_write),
        ("gpu.gated_activation", _gated_activation),
        ("gpu.top_k", _top_k),
    ]
    return [(name, bound(rule)) for name, rule in named]


def _dtype(site: Site, name: str) -> str:
    """An operand's type; float32 for one that the call lacks."""
    return str(site.types[name].dtype) if name in site.types else "float32"


def _linear_few(site: Site, tokens: int | None, params: GemvParameters) -> Kernel:
    assert isinstance(site.op, dialect.Linear)
    m, k = site.extents("weight")
    func = linear_few(
        FORMATS[site.op.format or "f32"],
        m,
        k,
        tokens,
        bias="bias" in site.types,
        residual="residual" in site.types,
        dtype=_dtype(site, "x"),
        vector_dtype=_dtype(site, "bias"),
        params=params,
    )
    return Kernel.of(func, site, ("x", "weight", "bias", "residual"))


def linear_tiles(
    site: Site, shape: TileShape, multiply: MultiplyTile = multiply_tile
) -> Kernel | None:
    """A projection of many tokens, in tiles of `shape` that `multiply` makes."""
    if not isinstance(site.op, dialect.Linear):
        return None
    m, k = site.extents("weight")
    func = linear_many(
        FORMATS[site.op.format or "f32"],
        m,
        k,
        bias="bias" in site.types,
        residual="residual" in site.types,
        dtype=_dtype(site, "x"),
        vector_dtype=_dtype(site, "bias"),
        params=shape,
        multiply=multiply,
    )
    return Kernel.of(func, site, ("x", "weight", "bias", "residual"))


def _grouped_linear(site: Site, params: GpuParameters) -> Kernel | None:
    if not isinstance(site.op, dialect.GroupedLinear):
        return None
    func = grouped_linear(
        *_experts(site),
        tokens=site.extents("expert_ids")[0] or None,
        per_token_input=_serves_all_choices(site),
        bias="bias" in site.types,
        dtype=_dtype(site, "x"),
        vector_dtype=_dtype(site, "bias"),
        params=params.gemv,
    )
    return Kernel.of(func, site, ("x", "expert_ids", "weight", "bias"))


def expert_tiles(site: Site, tile: Tile) -> Kernel | None:
    """The experts' product of many tokens by `tile`."""
    if not isinstance(site.op, dialect.GroupedLinear):
        return None
    func = grouped_tiles(
        *_experts(site),
        per_token_input=_serves_all_choices(site),
        bias="bias" in site.types,
        dtype=_dtype(site, "x"),
        vector_dtype=_dtype(site, "bias"),
        tile=tile,
    )
    return Kernel.of(func, site, ("x", "expert_ids", "weight", "bias"))


def _experts(site: Site) -> tuple[WeightFormat, int, int, int, int]:
    """(format, X, M, K, top_k)."""
    assert isinstance(site.op, dialect.GroupedLinear)
    num_experts, m, k = site.extents("weight")
    return FORMATS[site.op.format or "f32"], num_experts, m, k, site.extents("expert_ids")[1]


def _serves_all_choices(site: Site) -> bool:
    """True where a row of x is a token's, not a choice's."""
    rows = [str(site.types[n].shape[0]) for n in ("x", "expert_ids")]
    return rows[0] == rows[1]


def attention_kernel(
    site: Site,
    params: GpuParameters,
    *,
    prefill: Emit | None = None,
    decode: Emit | None = None,
) -> Kernel | None:
    """Paged attention, if that is what the call is; the target's own as in kernels/attention.py."""
    op = site.op
    if not isinstance(op, dialect.PagedAttention):
        return None
    _, _, heads, head_dim = site.extents("query")
    func = paged_attention(
        num_heads=heads,
        num_kv_heads=site.extents("k_pages")[1],
        head_dim=head_dim,
        v_head_dim=op.v_head_dim,
        page_size=site.page_size,
        kv_dtype=_dtype(site, "k_pages"),
        scale=op.scale,
        window=op.window,
        softcap=op.softcap,
        sinks="sinks" in site.types,
        group=op.group,
        num_groups=site.num_groups,
        tokens=site.tokens,
        dtype=_dtype(site, "query"),
        sink_dtype=_dtype(site, "sinks"),
        params=params,
        prefill=prefill,
        decode=decode,
    )
    return Kernel.of(func, site, (*type(op).operands[:-1], "sinks"))


def _embedding(site: Site, params: GpuParameters) -> Kernel | None:
    if not isinstance(site.op, dialect.Embedding):
        return None
    v, e = site.extents("weight")
    func = embedding(
        FORMATS[site.op.format or "f32"],
        v,
        e,
        tokens=site.tokens,
        dtype=_dtype(site, "weight"),
        params=params,
    )
    return Kernel.of(func, site, ("ids", "weight"))


def _norm(site: Site, params: GpuParameters) -> Kernel | None:
    op = site.op
    if not isinstance(op, dialect.RmsNorm | dialect.AddRmsNorm | dialect.LayerNorm):
        return None
    extents, dtype = site.extents("x"), _dtype(site, "x")
    rows = extents[1] or None
    vector = _dtype(site, "weight")
    if isinstance(op, dialect.LayerNorm):
        func = layer_norm(
            features=extents[-1],
            eps=op.eps,
            tokens=rows,
            dtype=dtype,
            vector_dtype=vector,
            params=params,
        )
        return Kernel.of(func, site, ("x", "weight", "bias"))
    if isinstance(op, dialect.AddRmsNorm):
        func = add_rms_norm(
            features=extents[-1],
            eps=op.eps,
            offset=op.offset,
            tokens=rows,
            dtype=dtype,
            vector_dtype=vector,
            params=params,
        )
        return Kernel.of(func, site, ("x", "residual", "weight"), (None, None))
    func = rms_norm(
        features=extents[-1],
        eps=op.eps,
        offset=op.offset,
        heads=extents[2] if len(extents) == 4 else None,
        tokens=rows,
        dtype=dtype,
        vector_dtype=vector,
        params=params,
    )
    return Kernel.of(func, site, ("x", "weight"))


def _rope(site: Site, params: GpuParameters) -> Kernel | None:
    op = site.op
    if isinstance(op, dialect.Rope):
        _, _, heads, head_dim = site.extents("x")
        func = rope(
            heads=heads,
            head_dim=head_dim,
            rotary_dim=op.rotary_dim,
            tokens=site.tokens,
            dtype=_dtype(site, "x"),
            params=params,
        )
        return Kernel.of(func, site, ("x", "cos", "sin"))
    if isinstance(op, dialect.RopeKvWrite):
        func = rope_kv_write(
            num_heads=op.num_heads,
            num_kv_heads=op.num_kv_heads,
            head_dim=op.head_dim,
            v_head_dim=op.v_head_dim,
            rotary_dim=op.rotary_dim,
            page_size=site.page_size,
            kv_dtype=_dtype(site, "k_pages"),
            group=op.group,
            num_groups=site.num_groups,
            tokens=site.tokens,
            dtype=_dtype(site, "qkv"),
            params=params,
        )
        return Kernel.of(func, site, type(op).operands, (None, "k_pages", "v_pages"))
    return None


def _kv_write(site: Site, params: GpuParameters) -> Kernel | None:
    if not isinstance(site.op, dialect.KvWrite):
        return None
    _, _, kv_heads, head_dim = site.extents("key")
    func = kv_write(
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=site.extents("value")[3],
        page_size=site.page_size,
        kv_dtype=_dtype(site, "k_pages"),
        group=site.op.group,
        num_groups=site.num_groups,
        tokens=site.tokens,
        dtype=_dtype(site, "key"),
        params=params,
    )
    return Kernel.of(func, site, type(site.op).operands, ("k_pages", "v_pages"))


def _gated_activation(site: Site, params: GpuParameters) -> Kernel | None:
    op = site.op
    if not isinstance(op, dialect.GatedActivation):
        return None
    _, rows, width = site.extents("x")
    func = gated_activation(
        inner=width // 2,
        kind=op.kind,
        tokens=rows or None,
        dtype=_dtype(site, "x"),
        params=params,
    )
    return Kernel.of(func, site, ("x",))


def _top_k(site: Site, params: GpuParameters) -> Kernel | None:
    if not isinstance(site.op, dialect.TopK):
        return None
    rows, columns = site.extents("x")
    func = top_k(
        columns=columns, k=site.op.k, tokens=rows or None, dtype=_dtype(site, "x"), params=params
    )
    return Kernel.of(func, site, ("x",), (None, None))
