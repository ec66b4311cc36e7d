"""llmc's own Relax operators: what tracing keeps whole, passes rewrite, targets turn into kernels.

An operator is a frozen dataclass of its static attributes; in the IR it is

    R.call_dps_packed("llmc.<name>", (operands…, R.str(attributes as JSON)), out_ty=…)

which Relax checks, prints and moves around as a pure call. Letters of shapes are those of
docs/shapes.md.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar, Self, TypeAlias

import tvm
from tvm import relax

Expr: TypeAlias = relax.Expr
_CALL = tvm.ir.Op.get("relax.call_dps_packed")


@dataclass(frozen=True, slots=True)
class Match:
    """A call of a dialect operator taken apart: operands by name, absent optional ones missing."""

    op: Operator
    operands: dict[str, Expr]
    out: list[relax.TensorType]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """Base of the dialect's operators; a name in `operands` that ends in "?" is optional."""

    name: ClassVar[str]
    operands: ClassVar[tuple[str, ...]]

    def emit(
        self, out: relax.TensorType | list[relax.TensorType], *values: Expr | None
    ) -> relax.Call:
        """The call for `values`, given in the order of `operands` (None: absent)."""
        if len(values) != len(self.operands):
            raise ValueError(f"{self.name} takes {self.operands}, got {len(values)} operands")
        present = []
        for operand, value in zip(self.operands, values, strict=True):
            if value is not None:
                present.append(operand.removesuffix("?"))
            elif not operand.endswith("?"):
                raise ValueError(f"{self.name}: operand {operand} is required")
        # Optional attributes that are not set are left out: IR dumps stay readable.
        fields = dataclasses.asdict(self).items()
        attributes = {"operands": present, **{k: v for k, v in fields if v is not None}}
        arguments = [v for v in values if v is not None]
        arguments.append(tvm.ir.StringImm(json.dumps(attributes, separators=(",", ":"))))
        return relax.op.call_dps_packed(f"llmc.{self.name}", arguments, out_ty=out)

    @classmethod
    def match(cls, expr: Expr | None) -> tuple[Self, dict[str, Expr]] | None:
        """(operator, operands) if `expr` calls this operator, else None."""
        found = match_any(expr)
        if found is None or type(found.op) is not cls:
            return None
        return found.op, found.operands


def operator_name(expr: Expr | None) -> str | None:
    """The name of the dialect operator `expr` calls, or None."""
    if not isinstance(expr, relax.Call) or not expr.op.same_as(_CALL):
        return None
    function = expr.args[0]
    if not isinstance(function, relax.ExternFunc):
        return None
    symbol = str(function.global_symbol)
    return symbol.removeprefix("llmc.") if symbol.startswith("llmc.") else None


def match_any(expr: Expr | None) -> Match | None:
    """Takes apart a call of any dialect operator; None for everything else."""
    name = operator_name(expr)
    if expr is None or name is None:
        return None
    *values, text = expr.args[1]
    attributes = json.loads(text.value)
    present = attributes.pop("operands")
    op = OPERATORS[name](**attributes)
    ty = expr.ty_args[0]
    out = list(ty.fields) if isinstance(ty, tvm.ir.TupleType) else [ty]
    return Match(op=op, operands=dict(zip(present, values, strict=True)), out=out)


def tensor_like(x: Expr, *last: int | tvm.ir.Expr) -> relax.TensorType:
    """The type of `x` with its last dimensions replaced by `last`."""
    shape = list(x.ty.shape)
    return relax.TensorType([*shape[: len(shape) - len(last)], *last], x.ty.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Operator):
    """x `[1, T, K]` · weight `[M, K]`ᵀ + bias `[M]` + residual `[1, T, M]`; `[K, M]` if transposed.

    `format` names an entry of llmc.formats once quantization has chosen one.
    """

    name: ClassVar[str] = "linear"
    operands: ClassVar[tuple[str, ...]] = ("x", "weight", "bias?", "residual?")
    transposed: bool = False
    format: str | None = None

    def call(
        self, x: Expr, weight: Expr, bias: Expr | None = None, residual: Expr | None = None
    ) -> relax.Call:
        """The call; its output is `[1, T, M]` (or of x's rank)."""
        features = weight.ty.shape[1 if self.transposed else 0]
        return self.emit(tensor_like(x, features), x, weight, bias, residual)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLinear(Operator):
    """Linear with what stands before and behind it.

    x `[1, T, K]` goes through RmsNorm where there is a `norm` `[K]` (`eps` and `offset` are its
    own); with `gate`, a kind of GatedActivation, the sums go through that -> `[1, T, M]`, or
    `[1, T, M / 2]`.
    """

    name: ClassVar[str] = "fused_linear"
    operands: ClassVar[tuple[str, ...]] = ("x", "norm?", "weight", "bias?", "residual?")
    eps: float = 0.0
    offset: float = 0.0
    gate: str | None = None
    format: str | None = None

    def call(
        self, x: Expr, norm: Expr | None, weight: Expr, bias: Expr | None, residual: Expr | None
    ) -> relax.Call:
        """The call."""
        features = weight.ty.shape[0] // (2 if self.gate else 1)
        return self.emit(tensor_like(x, features), x, norm, weight, bias, residual)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeActivations(Operator):
    """x `[1, T, K]` -> codes `[1, T, K]` int8, scales `[1, T, K / block]`, sums `[1, T, K / unit]`.

    x ≈ code · its block's scale; sums (int32) are a unit's codes added up, times `factor`.
    """

    name: ClassVar[str] = "quantize_activations"
    operands: ClassVar[tuple[str, ...]] = ("x",)
    block: int
    unit: int
    factor: int

    def call(self, x: Expr) -> relax.Call:
        """The call."""
        features = x.ty.shape[-1]
        codes = relax.TensorType(list(x.ty.shape), "int8")
        scales = tensor_like(x, features // self.block)
        sums = relax.TensorType(list(tensor_like(x, features // self.unit).shape), "int32")
        return self.emit([codes, scales, sums], x)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerLinear(Operator):
    """Linear on what QuantizeActivations made of x; the sum of a unit's products is an integer.

    weight `[M, K]` in the affine `format`; bias `[M]`; residual `[1, T, M]` -> `[1, T, M]` float32.
    """

    name: ClassVar[str] = "integer_linear"
    operands: ClassVar[tuple[str, ...]] = (
        "codes",
        "scales",
        "sums",
        "weight",
        "bias?",
        "residual?",
    )
    format: str
    block: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedIntegerLinear(Operator):
    """IntegerLinear, GatedActivation of its outputs (`kind`) and QuantizeActivations of those.

    weight `[M, K]`; the codes of the M / 2 outputs have blocks `out_block` and so on.
    """

    name: ClassVar[str] = "gated_integer_linear"
    operands: ClassVar[tuple[str, ...]] = ("codes", "scales", "sums", "weight", "bias?")
    format: str
    block: int
    kind: str
    out_block: int
    out_unit: int
    out_factor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundActivations(Operator):
    """x float32 -> the nearest bfloat16, as uint16."""

    name: ClassVar[str] = "round_activations"
    operands: ClassVar[tuple[str, ...]] = ("x",)

    def call(self, x: Expr) -> relax.Call:
        """The call."""
        return self.emit(relax.TensorType(list(x.ty.shape), "uint16"), x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bfloat16Linear(Operator):
    """Linear on what RoundActivations made of x, weight `[M, K]` in bf16 -> float32."""

    name: ClassVar[str] = "bfloat16_linear"
    operands: ClassVar[tuple[str, ...]] = ("x", "weight", "bias?", "residual?")
    format: str = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedBfloat16Linear(Operator):
    """Bfloat16Linear, GatedActivation of its outputs and RoundActivations of those."""

    name: ClassVar[str] = "gated_bfloat16_linear"
    operands: ClassVar[tuple[str, ...]] = ("x", "weight", "bias?")
    kind: str
    format: str = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding(Operator):
    """Rows of weight `[V, E]` for ids `[1, T]` -> `[1, T, E]` float32."""

    name: ClassVar[str] = "embedding"
    operands: ClassVar[tuple[str, ...]] = ("ids", "weight")
    format: str | None = None

    def call(self, ids: Expr, weight: Expr) -> relax.Call:
        """The call."""
        shape = [*ids.ty.shape, weight.ty.shape[1]]
        return self.emit(relax.TensorType(shape, weight.ty.dtype), ids, weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedLinear(Operator):
    """Each row times its expert's matrix: a mixture-of-experts product.

    x `[T, K]` (a row serves all of its token's experts) or `[T·X_k, K]`; weight `[X, M, K]`
    (`[X, K, M]` if transposed); bias `[X, M]`; expert_ids `[T, X_k]` -> `[T·X_k, M]`.
    """

    name: ClassVar[str] = "grouped_linear"
    operands: ClassVar[tuple[str, ...]] = ("x", "weight", "bias?", "expert_ids")
    transposed: bool = False
    format: str | None = None

    def call(self, x: Expr, weight: Expr, bias: Expr | None, expert_ids: Expr) -> relax.Call:
        """The call."""
        features = weight.ty.shape[2 if self.transposed else 1]
        tokens, top_k = expert_ids.ty.shape
        out = relax.TensorType([tokens * top_k, features], x.ty.dtype)
        return self.emit(out, x, weight, bias, expert_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerGroupedLinear(Operator):
    """GroupedLinear on what QuantizeActivations made of x as `[1, R, K]`, R being its rows."""

    name: ClassVar[str] = "integer_grouped_linear"
    operands: ClassVar[tuple[str, ...]] = (
        "codes",
        "scales",
        "sums",
        "weight",
        "bias?",
        "expert_ids",
    )
    format: str
    block: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(Operator):
    """Causal attention with K/V heads not repeated.

    query `[1, H, T, D]`, key `[1, Kv, T, D]`, value `[1, Kv, T, Dv]` -> `[1, T, H, Dv]`. scale
    multiplies the scores; softcap bounds them by softcap·tanh(s / softcap); window w shows position
    i the positions (i - w, i]; sinks `[H]` join the softmax and are dropped.
    """

    name: ClassVar[str] = "attention"
    operands: ClassVar[tuple[str, ...]] = ("query", "key", "value", "sinks?")
    layer: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    def call(self, query: Expr, key: Expr, value: Expr, sinks: Expr | None = None) -> relax.Call:
        """The call."""
        batch, heads, tokens, _ = query.ty.shape
        out = relax.TensorType([batch, tokens, heads, value.ty.shape[3]], query.ty.dtype)
        return self.emit(out, query, key, value, sinks)


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNorm(Operator):
    """x / sqrt(mean(x², last axis) + eps) · (weight + offset); offset is 0 or 1."""

    name: ClassVar[str] = "rms_norm"
    operands: ClassVar[tuple[str, ...]] = ("x", "weight")
    eps: float
    offset: float = 0.0

    def call(self, x: Expr, weight: Expr) -> relax.Call:
        """The call."""
        return self.emit(x.ty, x, weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedRmsNorm(Operator):
    """RmsNorm of x `[1, T, K]`, then QuantizeActivations."""

    name: ClassVar[str] = "quantized_rms_norm"
    operands: ClassVar[tuple[str, ...]] = ("x", "weight")
    eps: float
    offset: float = 0.0
    block: int
    unit: int
    factor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedRmsNorm(Operator):
    """RmsNorm of x `[1, T, K]`, then RoundActivations."""

    name: ClassVar[str] = "rounded_rms_norm"
    operands: ClassVar[tuple[str, ...]] = ("x", "weight")
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRmsNorm(Operator):
    """(sum, normed) with sum = x + residual and normed = RmsNorm(sum)."""

    name: ClassVar[str] = "add_rms_norm"
    operands: ClassVar[tuple[str, ...]] = ("x", "residual", "weight")
    eps: float
    offset: float = 0.0

    def call(self, x: Expr, residual: Expr, weight: Expr) -> relax.Call:
        """The call."""
        return self.emit([x.ty, x.ty], x, residual, weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorm(Operator):
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last axis."""

    name: ClassVar[str] = "layer_norm"
    operands: ClassVar[tuple[str, ...]] = ("x", "weight", "bias")
    eps: float

    def call(self, x: Expr, weight: Expr, bias: Expr) -> relax.Call:
        """The call."""
        return self.emit(x.ty, x, weight, bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK(Operator):
    """The k largest entries of each row of x `[T, X]`, descending.

    -> (values `[T, k]`, indices `[T, k]` i32)
    """

    name: ClassVar[str] = "top_k"
    operands: ClassVar[tuple[str, ...]] = ("x",)
    k: int

    def call(self, x: Expr) -> relax.Call:
        """The call."""
        values = tensor_like(x, self.k)
        return self.emit([values, relax.TensorType(list(values.shape), "int32")], x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope(Operator):
    """Rotates the first R features of each head of x `[1, T, H, D]` by cos, sin `[1, T, R]`.

    Halves are paired: out[i] = x[i]·cos[i] + rotate_half(x)[i]·sin[i] with rotate_half(x) =
    (-x[R/2:R], x[:R/2]) (RoFormer, in transformers' arrangement).
    """

    name: ClassVar[str] = "rope"
    operands: ClassVar[tuple[str, ...]] = ("x", "cos", "sin")
    rotary_dim: int

    def call(self, x: Expr, cos: Expr, sin: Expr) -> relax.Call:
        """The call."""
        return self.emit(x.ty, x, cos, sin)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedActivation(Operator):
    """act(gate)·up of x `[1, T, 2I]` = gate | up -> `[1, T, I]`.

    kind is silu, gelu, gelu_tanh or relu.
    """

    name: ClassVar[str] = "gated_activation"
    operands: ClassVar[tuple[str, ...]] = ("x",)
    kind: str

    def call(self, x: Expr) -> relax.Call:
        """The call."""
        return self.emit(tensor_like(x, x.ty.shape[-1] // 2), x)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvWrite(Operator):
    """Writes new keys and values into a layer's pages in place.

    key `[1, T, Kv, D]`, value `[1, T, Kv, Dv]` -> (k_pages, v_pages).
    """

    name: ClassVar[str] = "kv_write"
    operands: ClassVar[tuple[str, ...]] = ("key", "value", "slots", "k_pages", "v_pages")
    group: int

    def call(self, key: Expr, value: Expr, slots: Expr, k_pages: Expr, v_pages: Expr) -> relax.Call:
        """The call."""
        return self.emit([k_pages.ty, v_pages.ty], key, value, slots, k_pages, v_pages)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeKvWrite(Operator):
    """Rope on query and key of a fused projection, then KvWrite.

    qkv `[1, T, H·D + Kv·D + Kv·Dv]` -> (query `[1, T, H, D]`, k_pages, v_pages).
    """

    name: ClassVar[str] = "rope_kv_write"
    operands: ClassVar[tuple[str, ...]] = ("qkv", "cos", "sin", "slots", "k_pages", "v_pages")
    group: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    rotary_dim: int

    def call(
        self, qkv: Expr, cos: Expr, sin: Expr, slots: Expr, k_pages: Expr, v_pages: Expr
    ) -> relax.Call:
        """The call."""
        shape = [1, qkv.ty.shape[1], self.num_heads, self.head_dim]
        query = relax.TensorType(shape, qkv.ty.dtype)
        return self.emit([query, k_pages.ty, v_pages.ty], qkv, cos, sin, slots, k_pages, v_pages)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedAttention(Operator):
    """Attention over the pages of each sequence: query `[1, T, H, D]` -> `[1, T, H, Dv]`.

    factors is the type that a target may round what it multiplies to, float32 where it is None.
    """

    name: ClassVar[str] = "paged_attention"
    operands: ClassVar[tuple[str, ...]] = (
        "query",
        "q_starts",
        "kv_lens",
        "block_tables",
        "k_pages",
        "v_pages",
        "sinks?",
    )
    group: int
    scale: float
    v_head_dim: int
    window: int | None = None
    softcap: float | None = None
    factors: str | None = None

    def call(
        self,
        query: Expr,
        q_starts: Expr,
        kv_lens: Expr,
        block_tables: Expr,
        k_pages: Expr,
        v_pages: Expr,
        sinks: Expr | None,
    ) -> relax.Call:
        """The call."""
        out = tensor_like(query, self.v_head_dim)
        return self.emit(out, query, q_starts, kv_lens, block_tables, k_pages, v_pages, sinks)


OPERATORS: dict[str, type[Operator]] = {
    op.name: op
    for op in (
        Linear,
        FusedLinear,
        QuantizeActivations,
        IntegerLinear,
        GatedIntegerLinear,
        RoundActivations,
        Bfloat16Linear,
        GatedBfloat16Linear,
        Embedding,
        GroupedLinear,
        IntegerGroupedLinear,
        Attention,
        RmsNorm,
        QuantizedRmsNorm,
        RoundedRmsNorm,
        AddRmsNorm,
        LayerNorm,
        TopK,
        Rope,
        GatedActivation,
        KvWrite,
        RopeKvWrite,
        PagedAttention,
    )
}
