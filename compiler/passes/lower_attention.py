"""Paged attention: the function gets the step's signature, each attention reads and writes pages.

    attention(q, k, v)
    ->   pages = kv_write(k, v, slots, pages); paged_attention(q, block_tables, pages…)

Layers that see the same past share a cache group (one block table). The pages are arguments,
written in place and threaded through, so that no pass drops the write; the last contents are
returned by nobody because every write has a reader. docs/shapes.md has the signature.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler.rewriter import (
    Expr,
    Scope,
    apply_rule,
    bindings,
    relax_functions,
    static_shape,
    with_params,
)
from llmc.errors import UnsupportedError

_CACHES = "llmc.caches"
_STEP = "step"  # name of the lowered function
STEP_INPUTS = (
    "input_ids",
    "positions",
    "q_starts",
    "kv_lens",
    "block_tables",
    "slots",
    "state_slots",
    "logits_rows",
)
_HEADS_FIRST = [0, 2, 1, 3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Shape of one page of a layer: keys and values, and what a token takes in it."""

    key: list[int]
    value: list[int]


# (kv heads, head size, value head size, page size) -> shapes of a page
PageLayout = Callable[[int, int, int, int], Page]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One cache tensor that the lowered function takes as an argument."""

    name: str
    layer: int
    group: int
    dtype: str
    page_shape: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """All cache tensors in argument order, and the window of each group (None: no limit)."""

    windows: list[int | None]
    tensors: list[Cache]


def caches_of(mod: tvm.IRModule) -> Caches:
    """What lower_attention recorded on `mod`."""
    data = json.loads(str(mod.attrs[_CACHES]))
    return Caches(windows=data["windows"], tensors=[Cache(**c) for c in data["tensors"]])


def lower_attention(
    mod: tvm.IRModule,
    *,
    page_size: int,
    kv_dtype: str,
    page_layout: PageLayout,
    factors: str | None = None,
) -> tvm.IRModule:
    """Lowers every attention of the function; UnsupportedError for what has no paged form.

    factors: see dialect.PagedAttention.
    """
    [(name, func)] = list(relax_functions(mod))
    ids, positions, rows, *weights = func.params
    layers = _layers(func)
    windows: list[int | None] = []
    for op, _ in layers:
        if op.window not in windows:
            windows.append(op.window)
    tokens = ids.ty.shape[1]
    step = _step_params(tokens, rows, len(windows))
    pages: dict[int, tuple[relax.Var, relax.Var]] = {}
    tensors: list[Cache] = []
    counts = [tvm.tirx.Var(f"P{g}", "int64") for g in range(len(windows))]
    for op, operands in layers:
        group = windows.index(op.window)
        kv_heads, head_dim = (static_shape(operands["key"])[i] for i in (1, 3))
        v_head_dim = static_shape(operands["value"])[3]
        if None in (kv_heads, head_dim, v_head_dim):
            raise UnsupportedError(f"attention of layer {op.layer} has no fixed head size")
        page = page_layout(kv_heads, head_dim, v_head_dim, page_size)  # type: ignore[arg-type]
        made = []
        for kind, shape in (("k", page.key), ("v", page.value)):
            cache = Cache(
                name=f"{kind}_pages_{op.layer}",
                layer=op.layer,
                group=group,
                dtype=kv_dtype,
                page_shape=shape,
            )
            tensors.append(cache)
            ty = relax.TensorType([counts[group], *shape], kv_dtype)
            made.append(relax.Var(cache.name, ty))
        pages[op.layer] = (made[0], made[1])

    def rewrite(call: Expr, scope: Scope) -> Expr | None:
        found = dialect.Attention.match(call)
        if found is None:
            return None
        return _lower(found[0], found[1], scope, step, pages, windows, factors)

    flat = [v for pair in pages.values() for v in pair]
    wide = mod.clone()
    added = [v for v in step.values() if not v.same_as(rows)]
    wide[name] = with_params(func, [*func.params, *added, *flat])
    lowered = apply_rule(wide, rewrite)[name]
    host = relax.Var("host", relax.ShapeType([tvm.tirx.Var(n, "int64") for n in _HOST]))
    caches = Caches(windows=windows, tensors=tensors)
    out = tvm.IRModule({_STEP: _finish(lowered, ids, positions, rows, step, host, flat, weights)})
    out = out.with_attrs(mod.attrs) if mod.attrs else out
    return out.with_attr(_CACHES, json.dumps(asdict(caches)))


_HOST = ("num_decodes", "max_q_len", "max_kv_len")


def _layers(func: relax.Function) -> list[tuple[dialect.Attention, dict[str, Expr]]]:
    found = []
    for binding in bindings(func):
        match = dialect.Attention.match(binding.value)
        if match is not None:
            found.append(match)
    seen = [op.layer for op, _ in found]
    twice = {layer for layer in seen if seen.count(layer) > 1}
    if twice:
        raise UnsupportedError(f"layers {sorted(twice)} attend more than once")
    return found


def _step_params(tokens: tvm.ir.Expr, rows: relax.Var, groups: int) -> dict[str, relax.Var]:
    """The per-step tensors of the signature, all int32."""
    sequences, blocks = (tvm.tirx.Var(n, "int64") for n in ("S", "B"))
    shapes: dict[str, list[object]] = {
        "input_ids": [tokens],
        "positions": [tokens],
        "q_starts": [sequences + 1],
        "kv_lens": [sequences],
        "block_tables": [groups, sequences, blocks],
        "slots": [groups, tokens],
        "state_slots": [sequences],
    }
    made = {n: relax.Var(n, relax.TensorType(s, "int32")) for n, s in shapes.items()}
    return {**made, "logits_rows": rows}


def _lower(
    op: dialect.Attention,
    operands: dict[str, Expr],
    scope: Scope,
    step: dict[str, relax.Var],
    pages: dict[int, tuple[relax.Var, relax.Var]],
    windows: list[int | None],
    factors: str | None,
) -> relax.Call:
    """kv_write, then paged_attention on tokens-first tensors."""
    group = windows.index(op.window)
    query, key, value = (
        scope.emit(relax.op.permute_dims(operands[n], _HEADS_FIRST))
        for n in ("query", "key", "value")
    )
    write = dialect.KvWrite(group=group)
    written = scope.emit(write.call(key, value, step["slots"], *pages[op.layer]))
    k_pages, v_pages = (scope.emit(relax.TupleGetItem(written, i)) for i in range(2))
    attention = dialect.PagedAttention(
        group=group,
        scale=op.scale,
        v_head_dim=int(operands["value"].ty.shape[3]),
        window=op.window,
        softcap=op.softcap,
        factors=factors,
    )
    tables = (step["q_starts"], step["kv_lens"], step["block_tables"])
    return attention.call(query, *tables, k_pages, v_pages, operands.get("sinks"))


def _finish(
    func: relax.Function,
    ids: relax.Var,
    positions: relax.Var,
    rows: relax.Var,
    step: dict[str, relax.Var],
    host: relax.Var,
    pages: list[relax.Var],
    weights: list[relax.Var],
) -> relax.Function:
    """The step's signature around the lowered body; ids and positions get their leading 1 back."""
    wide = [
        relax.VarBinding(old, relax.op.reshape(step[new], old.ty.shape))
        for old, new in ((ids, "input_ids"), (positions, "positions"))
    ]
    logits = func.body.body
    flat = relax.Var("logits", relax.TensorType(list(logits.ty.shape)[1:], logits.ty.dtype))
    out = relax.VarBinding(flat, relax.op.reshape(logits, relax.ShapeExpr(list(flat.ty.shape))))
    first = relax.BindingBlock(wide)
    last = relax.BindingBlock([out])
    body = relax.SeqExpr([first, *func.body.blocks, last], flat)
    params = [*(step[n] for n in STEP_INPUTS), host, *pages, *weights]
    function = relax.Function(params, body, flat.ty, is_pure=True)
    return function.with_attr("global_symbol", _STEP)
