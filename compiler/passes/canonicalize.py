"""Canonicalize: one spelling for everything that later passes look for.

Stands first. After it:
* products with a weight parameter are `llmc.linear` on rank-3 tensors `[1, T, K]`, table look-ups
  of a parameter are
  `llmc.embedding`;
* slices have explicit ends, `split` and full or empty pieces are gone, reshape chains are one
  reshape;
* factors of one, casts to the own type and `power` by small integers are gone.
"""

from __future__ import annotations

import functools
import operator

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler.rewriter import (
    Expr,
    Scope,
    apply_rule,
    op_args,
    same_shape,
    scalar,
    static_shape,
)


def canonicalize(mod: tvm.IRModule) -> tvm.IRModule:
    """Applies the rules of this file until nothing changes (they enable each other once)."""
    mod = apply_rule(mod, _rewrite)
    return apply_rule(mod, _rewrite)


def _rewrite(call: Expr, scope: Scope) -> Expr | None:
    for rule in (
        _split_piece,
        _slice,
        _concat,
        _cast,
        _reshape,
        _permute,
        _multiply_by_one,
        _power,
        _matmul,
        _linear_rank,
        _take,
        _layer_norm,
        _topk,
    ):
        replaced = rule(call, scope)
        if replaced is not None:
            return replaced
    return None


def _split_piece(item: Expr, scope: Scope) -> Expr | None:
    """split(x, sections)[i] -> strided_slice(x)."""
    if not isinstance(item, relax.TupleGetItem):
        return None
    source = scope.value(item.tuple_value)
    args = op_args(source, "relax.split")
    if args is None:
        return None
    x, axis = args[0], source.attrs.axis % len(args[0].ty.shape)
    extent = static_shape(x)[axis]
    if extent is None:
        return None
    sections = source.attrs.indices_or_sections
    if isinstance(sections, tvm.tirx.IntImm | int):
        width = -(-extent // int(sections))  # the last piece is the smaller one
        cuts = [min(i * width, extent) for i in range(int(sections) + 1)]
    else:
        cuts = [0, *(int(c) for c in sections), extent]
    return slice_axis(x, axis, cuts[item.index], cuts[item.index + 1])


def slice_axis(x: Expr, axis: int, begin: int, end: int) -> relax.Call:
    """x[…, begin:end, …] along `axis`."""
    return relax.op.strided_slice(x, [axis], [begin], [end])


def slice_bounds(expr: Expr) -> tuple[Expr, int, int, int] | None:
    """(x, axis, begin, end) of a stride-1 slice along one static axis, else None."""
    args = op_args(expr, "relax.strided_slice")
    if args is None:
        return None
    x, axes, begins, ends = args[:4]
    strides = [1] if len(args) < 5 else [int(s) for s in args[4]]
    if len(axes) != 1 or strides != [1]:
        return None
    axis = int(axes[0]) % len(x.ty.shape)
    extent = static_shape(x)[axis]
    if extent is None or not all(isinstance(v[0], tvm.tirx.IntImm) for v in (begins, ends)):
        return None
    given = (int(v[0]) for v in (begins, ends))
    begin, end = (min(max(v + extent if v < 0 else v, 0), extent) for v in given)
    return x, axis, begin, max(begin, end)


def _slice(call: Expr, scope: Scope) -> Expr | None:
    """Full slices vanish; ends beyond the tensor (torch writes 2^63 - 1) become the extent."""
    found = slice_bounds(call)
    if found is None:
        return None
    x, axis, begin, end = found
    if begin == 0 and end == static_shape(x)[axis]:
        return x
    inner = slice_bounds(scope.value(x))
    if inner is not None and inner[1] == axis:
        return slice_axis(inner[0], axis, inner[2] + begin, inner[2] + end)
    if (int(call.args[2][0]), int(call.args[3][0])) != (begin, end):
        return slice_axis(x, axis, begin, end)
    return None


def _concat(call: Expr, scope: Scope) -> Expr | None:
    """Empty pieces of a concatenation vanish; a concatenation of one piece is that piece."""
    args = op_args(call, "relax.concat")
    if args is None:
        return None
    pieces = scope.value(args[0])
    if not isinstance(pieces, relax.Tuple):
        return None
    axis = call.attrs.axis
    kept = [p for p in pieces.fields if 0 not in static_shape(p)]
    if axis is None or not kept:
        return None
    if len(kept) == 1:
        return kept[0]
    return None if len(kept) == len(pieces.fields) else relax.op.concat(kept, int(axis))


def _cast(call: Expr, scope: Scope) -> Expr | None:
    """Casts to the own type vanish, and those to a wider integer and back."""
    args = op_args(call, "relax.astype")
    if args is None:
        return None
    if args[0].ty.dtype == call.ty.dtype:
        return args[0]
    inner = op_args(scope.value(args[0]), "relax.astype")
    if inner is not None:
        chain = [str(e.ty.dtype) for e in (inner[0], args[0], call)]
        if chain == ["int32", "int64", "int32"]:
            return inner[0]
    return None


def _reshape(call: Expr, scope: Scope) -> Expr | None:
    args = op_args(call, "relax.reshape")
    if args is None:
        return None
    if same_shape(args[0], call):
        return args[0]
    inner = op_args(scope.value(args[0]), "relax.reshape")
    if inner is None:
        return None
    return inner[0] if same_shape(inner[0], call) else relax.op.reshape(inner[0], args[1])


def _permute(call: Expr, scope: Scope) -> Expr | None:
    """permute(permute(x)) becomes one permutation, or none."""
    args = op_args(call, "relax.permute_dims")
    if args is None:
        return None
    inner_call = scope.value(args[0])
    inner = op_args(inner_call, "relax.permute_dims")
    if inner is None or call.attrs.axes is None or inner_call.attrs.axes is None:
        return None
    axes = [int(inner_call.attrs.axes[int(a)]) for a in call.attrs.axes]
    if axes == list(range(len(axes))):
        return inner[0]
    return relax.op.permute_dims(inner[0], axes)


def _multiply_by_one(call: Expr, scope: Scope) -> Expr | None:
    args = op_args(call, "relax.multiply")
    if args is None:
        return None
    for x, factor in (args, reversed(args)):
        if scalar(factor) == 1.0 and same_shape(x, call):
            return x
    return None


def _power(call: Expr, scope: Scope) -> Expr | None:
    """power(x, 2) and power(x, 3) become products: pow is a library call an element."""
    args = op_args(call, "relax.power")
    if args is None or not same_shape(args[0], call):
        return None
    exponent = scalar(args[1])
    if exponent == 2.0:
        return relax.op.multiply(args[0], args[0])
    if exponent == 3.0:
        return relax.op.multiply(scope.emit(relax.op.multiply(args[0], args[0])), args[0])
    return None


def _matmul(call: Expr, scope: Scope) -> Expr | None:
    """matmul(x, W) or matmul(x, permute_dims(W)) with a parameter W -> llmc.linear."""
    args = op_args(call, "relax.matmul")
    if args is None:
        return None
    x, weight = args
    transposed = True
    source = scope.value(weight)
    inner = op_args(source, "relax.permute_dims")
    if inner is not None and _swaps_two_axes(source):
        weight, transposed = inner[0], False
        source = scope.value(weight)
    if not is_parameter(source) or len(weight.ty.shape) != 2:
        return None
    return dialect.Linear(transposed=transposed).call(x, weight)


def _swaps_two_axes(permutation: relax.Call) -> bool:
    axes = permutation.attrs.axes
    return len(permutation.ty.shape) == 2 and (axes is None or [int(a) % 2 for a in axes] == [1, 0])


def is_parameter(value: Expr) -> bool:
    """Whether a looked-up value is an argument of the function (nothing is bound to it)."""
    return isinstance(value, relax.Var) and isinstance(value.ty, relax.TensorType)


def _linear_rank(call: Expr, scope: Scope) -> Expr | None:
    """linear on `[T, K]` or `[1, T, H, K]` -> reshape(linear(reshape(x, [1, rows, K])))."""
    found = dialect.Linear.match(call)
    if found is None or "residual" in found[1]:
        return None
    op, operands = found
    *lead, features = operands["x"].ty.shape
    if len(lead) == 2:
        return None
    rows = functools.reduce(operator.mul, lead, tvm.tirx.const(1, "int64"))
    x = scope.emit(relax.op.reshape(operands["x"], relax.ShapeExpr([1, rows, features])))
    product = scope.emit(op.call(x, operands["weight"], operands.get("bias")))
    return relax.op.reshape(product, relax.ShapeExpr(list(call.ty.shape)))


def _take(call: Expr, scope: Scope) -> Expr | None:
    """take(W, ids, axis=0) of a parameter `[V, E]` -> llmc.embedding on ids `[1, T]`.

    Other look-ups become safe ones: an index out of bounds is clipped instead of read.
    """
    args = op_args(call, "relax.take")
    if args is None or call.attrs.axis is None:
        return None
    weight, ids = args
    table = is_parameter(scope.value(weight)) and len(weight.ty.shape) == 2
    ids_shape = static_shape(ids)
    if table and int(call.attrs.axis) == 0 and len(ids_shape) == 2 and ids_shape[0] == 1:
        return dialect.Embedding().call(ids, weight)
    if not table or int(call.attrs.axis) != 0 or len(ids_shape) != 1:
        if call.attrs.mode == "clip":
            return None
        return relax.op.take(weight, ids, int(call.attrs.axis), mode="clip")
    row = scope.emit(relax.op.reshape(ids, relax.ShapeExpr([1, ids.ty.shape[0]])))
    rows = scope.emit(dialect.Embedding().call(row, weight))
    return relax.op.reshape(rows, relax.ShapeExpr(list(call.ty.shape)))


def _layer_norm(call: Expr, scope: Scope) -> Expr | None:
    args = op_args(call, "relax.nn.layer_norm")
    if args is None or [int(a) % len(call.ty.shape) for a in call.attrs.axes] != [
        len(call.ty.shape) - 1
    ]:
        return None
    if len(call.ty.shape) != 3:  # what kernels take: rows `[1, T, E]`
        return None
    return dialect.LayerNorm(eps=float(call.attrs.epsilon)).call(*args)


def _topk(item: Expr, scope: Scope) -> Expr | None:
    """A piece of topk over the last axis -> llmc.top_k, whose indices are int32."""
    if not isinstance(item, relax.TupleGetItem):
        return None
    source = scope.value(item.tuple_value)
    args = op_args(source, "relax.topk")
    if args is None or len(args[0].ty.shape) != 2 or not source.attrs.largest:
        return None
    if int(source.attrs.axis) % 2 != 1 or source.attrs.ret_type != "both":
        return None
    pair = scope.emit(dialect.TopK(k=int(source.attrs.k)).call(args[0]))
    piece = relax.TupleGetItem(pair, item.index)
    if item.index == 0:
        return piece
    return relax.op.astype(scope.emit(piece), source.attrs.dtype)
