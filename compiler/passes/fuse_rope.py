"""Recover rotary position embedding, and move the transposition of heads behind it.

Two spellings are known, both rotating pairs (i, i + R/2) of a head's first R features:

    x · cos + concat(-x[R/2:], x[:R/2]) · sin                        cos, sin [1, 1, T, R]
    concat(x1 · cos - x2 · sin, x2 · cos + x1 · sin)                 cos, sin [1, 1, T, R/2]

x is `[1, H, T, D]`, transposed from `[1, T, H, D]`; the rotation acts on the latter, so that the
transposition meets the one that attention undoes. A rotation of R < D features followed by
concat(rotated, rest) is one operator as well. Source: Su et al., RoFormer, 2021.
"""

from __future__ import annotations

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler.passes.canonicalize import slice_bounds
from llmc.compiler.rewriter import Expr, Scope, apply_rule, op_args, same_extent, static_shape

_HEADS_FIRST = [0, 2, 1, 3]


def fuse_rope(mod: tvm.IRModule) -> tvm.IRModule:
    """Rewrites every rotation of `mod`; partial ones in a second round."""
    mod = apply_rule(mod, _rewrite)
    return apply_rule(mod, _rewrite_partial)


def _rewrite(call: Expr, scope: Scope) -> Expr | None:
    for match in (_half_split, _two_halves):
        found = match(call, scope)
        if found is None:
            continue
        x, cos, sin = found
        if len(x.ty.shape) != 4 or not _per_token(cos, x) or not _per_token(sin, x):
            continue
        return _emit(scope, x, _flat(scope, cos), _flat(scope, sin))
    return None


def _half_split(call: Expr, scope: Scope) -> tuple[Expr, Expr, Expr] | None:
    """x · cos + rotate_half(x) · sin."""
    terms = op_args(call, "relax.add")
    if terms is None:
        return None
    for straight, crossed in (terms, reversed(terms)):
        a = op_args(scope.value(straight), "relax.multiply")
        b = op_args(scope.value(crossed), "relax.multiply")
        if a is None or b is None:
            continue
        for x, cos in (a, reversed(a)):
            for rotated, sin in (b, reversed(b)):
                if _is_rotate_half(rotated, x, scope):
                    return x, cos, sin
    return None


def _is_rotate_half(expr: Expr, x: Expr, scope: Scope) -> bool:
    """Whether expr is concat(-x[half:], x[:half]) over the last axis."""
    pieces = _concat_pieces(expr, scope)
    if pieces is None:
        return False
    negated = op_args(scope.value(pieces[0]), "relax.negative")
    if negated is None:
        return False
    width = static_shape(x)[-1]
    return (
        width is not None
        and _is_slice(negated[0], x, width // 2, width, scope)
        and _is_slice(pieces[1], x, 0, width // 2, scope)
    )


def _two_halves(call: Expr, scope: Scope) -> tuple[Expr, Expr, Expr] | None:
    """concat(x1·cos - x2·sin, x2·cos + x1·sin); cos and sin are doubled to R entries."""
    pieces = _concat_pieces(call, scope)
    if pieces is None:
        return None
    low = op_args(scope.value(pieces[0]), "relax.subtract")
    high = op_args(scope.value(pieces[1]), "relax.add")
    if low is None or high is None:
        return None
    products = [op_args(scope.value(e), "relax.multiply") for e in (*low, *high)]
    if any(p is None for p in products):
        return None
    (x1, cos), (x2, sin), (x2_too, cos_too), (x1_too, sin_too) = products  # type: ignore[misc]
    if not all(
        a.same_as(b) for a, b in ((x1, x1_too), (x2, x2_too), (cos, cos_too), (sin, sin_too))
    ):
        return None
    first, second = slice_bounds(scope.value(x1)), slice_bounds(scope.value(x2))
    if first is None or second is None or not first[0].same_as(second[0]):
        return None
    x = first[0]
    width = static_shape(x)[-1]
    if width is None or first[1:] != (3, 0, width // 2) or second[1:] != (3, width // 2, width):
        return None
    return x, _doubled(scope, cos), _doubled(scope, sin)


def _doubled(scope: Scope, table: Expr) -> Expr:
    return scope.emit(relax.op.concat([table, table], -1))


def _rewrite_partial(call: Expr, scope: Scope) -> Expr | None:
    """concat(permute(rope(x[:R])), x'[R:]) -> permute(rope(x)) with rotary_dim R."""
    pieces = _concat_pieces(call, scope)
    if pieces is None:
        return None
    permuted = op_args(scope.value(pieces[0]), "relax.permute_dims")
    found = dialect.Rope.match(scope.value(permuted[0])) if permuted else None
    if found is None:
        return None
    op, operands = found
    rest = slice_bounds(scope.value(pieces[1]))
    if rest is None or rest[1] != 3 or rest[2] != op.rotary_dim:
        return None
    whole = rest[0]
    if rest[3] != static_shape(whole)[3]:
        return None
    rotated = slice_bounds(scope.value(_untransposed(scope, operands["x"])))
    if rotated is None or rotated[1:] != (3, 0, op.rotary_dim) or not rotated[0].same_as(whole):
        return None
    return _emit(scope, whole, operands["cos"], operands["sin"])


def _untransposed(scope: Scope, x: Expr) -> Expr:
    """What was transposed to give x, or x."""
    args = op_args(scope.value(x), "relax.permute_dims")
    return x if args is None else args[0]


def _emit(scope: Scope, x: Expr, cos: Expr, sin: Expr) -> relax.Call:
    """permute(rope(permute(x))), the inner permutation cancelled where x was transposed itself."""
    permuted = scope.value(x)
    args = op_args(permuted, "relax.permute_dims")
    if args is not None and [int(a) for a in permuted.attrs.axes] == _HEADS_FIRST:
        tokens_first = args[0]
    else:
        tokens_first = scope.emit(relax.op.permute_dims(x, _HEADS_FIRST))
    op = dialect.Rope(rotary_dim=int(cos.ty.shape[-1]))
    rotated = scope.emit(op.call(tokens_first, cos, sin))
    return relax.op.permute_dims(rotated, _HEADS_FIRST)


def _per_token(table: Expr, x: Expr) -> bool:
    """Whether a cos or sin table is `[1, 1, T, R]` for x `[1, H, T, R]`, nothing broadcast."""
    shape = static_shape(table)
    if len(shape) != 4 or shape[:2] != [1, 1] or shape[3] is None:
        return False
    return same_extent(table, x, 2) and same_extent(table, x, 3)


def _flat(scope: Scope, table: Expr) -> Expr:
    """`[1, 1, T, R]` -> `[1, T, R]`, undoing an expand_dims where there was one."""
    expanded = scope.value(table)
    args = op_args(expanded, "relax.expand_dims")
    if args is not None and [int(a) for a in expanded.attrs.axis] == [1]:
        return args[0]
    shape = list(table.ty.shape)
    return scope.emit(relax.op.reshape(table, relax.ShapeExpr([shape[0], *shape[2:]])))


def _concat_pieces(expr: Expr, scope: Scope) -> list[Expr] | None:
    """The two pieces of a concatenation over the last axis of a rank-4 tensor."""
    value = scope.value(expr)
    args = op_args(value, "relax.concat")
    if args is None:
        return None
    pieces = scope.value(args[0])
    if not isinstance(pieces, relax.Tuple) or len(pieces.fields) != 2:
        return None
    if len(pieces.fields[0].ty.shape) != 4 or int(value.attrs.axis) not in (-1, 3):
        return None
    return list(pieces.fields)


def _is_slice(expr: Expr, x: Expr, begin: int, end: int, scope: Scope) -> bool:
    """Whether expr is x[..., begin:end], where x may be a slice itself."""
    found = slice_bounds(scope.value(expr))
    if found is None or found[1] != 3:
        return False
    if found[0].same_as(x):
        return found[2:] == (begin, end)
    outer = slice_bounds(scope.value(x))
    if outer is None or outer[1] != 3 or not outer[0].same_as(found[0]):
        return False
    return found[2:] == (outer[2] + begin, outer[2] + end)
