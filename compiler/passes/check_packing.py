"""Proves that packing sequences along T is sound: no operator but attention mixes tokens.

Stands after rewrite_gqa, before T gets any meaning. Every operator that touches a tensor with the
axis T must be elementwise in it, or one whose treatment of axes is known and leaves T alone. An
operator that reduces, shifts, scans or convolves along T, and any operator this file does not know,
is an UnsupportedError that names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler.rewriter import Expr, bindings, relax_functions
from llmc.errors import UnsupportedError

_ELEMENTWISE_NAMES = """
    abs add astype bitwise_and bitwise_not bitwise_or broadcast_to ceil clip cos divide equal
    erf exp expand_dims floor floor_divide floor_mod full full_like greater greater_equal less
    less_equal log logical_and logical_not logical_or maximum minimum mod multiply negative
    not_equal ones_like permute_dims power round rsqrt sigmoid sign sin sqrt square subtract tan
    tanh where zeros_like nn.gelu nn.gelu_tanh nn.leakyrelu nn.relu nn.silu nn.softplus
"""
_REDUCTION_NAMES = "argmax argmin max mean min prod std sum variance"
_ONE_AXIS_NAMES = "argsort concat cumsum nn.log_softmax nn.softmax sort split topk"


def _operators(names: str) -> frozenset[str]:
    return frozenset(f"relax.{name}" for name in names.split())


_ELEMENTWISE = _operators(_ELEMENTWISE_NAMES)
_REDUCTIONS = _operators(_REDUCTION_NAMES)
_ALONG_ONE_AXIS = _operators(_ONE_AXIS_NAMES)
# Make a tensor [.., T, ..] from nothing that has T, every token's part alike. arange does not: it
# counts along the packed axis, across sequences.
_CONSTANTS = _operators("broadcast_to full ones zeros")


def check_packing(mod: tvm.IRModule) -> tvm.IRModule:
    """Returns `mod` unchanged, or raises UnsupportedError naming the operator that mixes tokens."""
    for _, func in relax_functions(mod):
        tokens = func.params[0].ty.shape[-1]
        rows = func.params[2].ty.shape[0]
        values = {b.var: b.value for b in bindings(func)}
        for value in values.values():
            if isinstance(value, relax.Call):
                for axis in (tokens, rows):
                    _check(value, axis, rows, values)
    return mod


def _check(
    call: relax.Call, tokens: tvm.ir.Expr, rows: tvm.ir.Expr, values: dict[relax.Var, Expr]
) -> None:
    """Checks one call for one of the two axes of tokens: T itself, or the rows L taken from it."""
    found = dialect.match_any(call)
    if found is not None:
        x = found.operands.get("x")
        if x is not None and _depends_on(x.ty.shape[-1], tokens):
            _raise(f"llmc.{found.op.name}", x)
        return
    name = call.op.name if isinstance(call.op, tvm.ir.Op) else str(call.op)
    operands = [a for a in _tensors(call, values) if _token_axes(a, tokens)]
    if not operands and name not in _CONSTANTS and _token_axes(call, tokens):
        _raise(name, call)
    if not operands or (name in _ELEMENTWISE and _keeps_alignment(operands)):
        return
    for x in operands:
        axes = _token_axes(x, tokens)
        if not _SAFE.get(name, _refuse)(call, x, axes, tokens, rows):
            _raise(name, x)


def _raise(name: str, x: Expr) -> NoReturn:
    raise UnsupportedError(
        f"operator {name} on {_describe(x)} mixes the tokens of different sequences "
        "(or is not known not to)",
        hint="models whose layers look at neighbouring tokens outside attention are not supported",
    )


def _tensors(call: relax.Call, values: dict[relax.Var, Expr]) -> list[Expr]:
    """The tensor operands of a call, those in tuples included."""
    found: list[Expr] = []
    for argument in call.args:
        value = values.get(argument, argument) if isinstance(argument, relax.Var) else argument
        if isinstance(value, relax.Tuple):
            found += [f for f in value.fields if isinstance(f.ty, relax.TensorType)]
        elif isinstance(getattr(argument, "ty", None), relax.TensorType):
            found.append(argument)
    return found


def _depends_on(extent: tvm.ir.Expr, var: tvm.ir.Expr) -> bool:
    return any(v.same_as(var) for v in tvm.tirx.analysis.undefined_vars(extent))


def _token_axes(x: Expr, tokens: tvm.ir.Expr) -> list[int]:
    """The axes whose extent depends on `tokens`; none for what is not a tensor."""
    if not isinstance(x.ty, relax.TensorType):
        return []
    return [i for i, extent in enumerate(x.ty.shape) if _depends_on(extent, tokens)]


def _keeps_alignment(operands: list[Expr]) -> bool:
    """Operands broadcast against each other; none may hold T twice (a T × T table mixes tokens)."""
    return all(sum(not isinstance(e, tvm.tirx.IntImm) for e in x.ty.shape) == 1 for x in operands)


Check = Callable[[relax.Call, Expr, list[int], tvm.ir.Expr, tvm.ir.Expr], bool]


def _refuse(
    call: relax.Call, x: Expr, axes: list[int], tokens: tvm.ir.Expr, rows: tvm.ir.Expr
) -> bool:
    return False


def _reduction(
    call: relax.Call, x: Expr, axes: list[int], tokens: tvm.ir.Expr, rows: tvm.ir.Expr
) -> bool:
    reduced = call.attrs.axis
    if reduced is None:
        return False
    reduced = [reduced] if isinstance(reduced, tvm.tirx.IntImm | int) else reduced
    return not {int(a) % len(x.ty.shape) for a in reduced} & set(axes)


def _along_axis(
    call: relax.Call, x: Expr, axes: list[int], tokens: tvm.ir.Expr, rows: tvm.ir.Expr
) -> bool:
    axis = call.attrs.axis
    return axis is not None and int(axis) % len(x.ty.shape) not in axes


def _strided_slice(
    call: relax.Call, x: Expr, axes: list[int], tokens: tvm.ir.Expr, rows: tvm.ir.Expr
) -> bool:
    return not {int(a) % len(x.ty.shape) for a in call.args[1]} & set(axes)


def _take(
    call: relax.Call, x: Expr, axes: list[int], tokens: tvm.ir.Expr, rows: tvm.ir.Expr
) -> bool:
    """Rows of a table by token, or the rows whose logits are wanted."""
    table, index = call.args
    if x.same_as(index) and not _token_axes(table, tokens):
        return True
    return x.same_as(table) and len(index.ty.shape) == 1 and index.ty.shape[0].same_as(rows)


def _reshape(
    call: relax.Call, x: Expr, axes: list[int], tokens: tvm.ir.Expr, rows: tvm.ir.Expr
) -> bool:
    """Row-major order keeps tokens apart if what stands before T is one, on both sides."""
    out = _token_axes(call, tokens)
    return (
        len(axes) == 1
        and len(out) == 1
        and all(_is_one(e) for e in list(x.ty.shape)[: axes[0]])
        and all(_is_one(e) for e in list(call.ty.shape)[: out[0]])
    )


def _is_one(extent: tvm.ir.Expr) -> bool:
    return isinstance(extent, tvm.tirx.IntImm) and int(extent) == 1


def _layer_norm(
    call: relax.Call, x: Expr, axes: list[int], tokens: tvm.ir.Expr, rows: tvm.ir.Expr
) -> bool:
    return not {int(a) % len(x.ty.shape) for a in call.attrs.axes} & set(axes)


def _matmul(
    call: relax.Call, x: Expr, axes: list[int], tokens: tvm.ir.Expr, rows: tvm.ir.Expr
) -> bool:
    """T may be a row index, or a batch index, of the left operand only."""
    left, right = call.args
    return x.same_as(left) and len(left.ty.shape) - 1 not in axes and not _token_axes(right, tokens)


_SAFE: dict[str, Check] = {
    **{name: _reduction for name in _REDUCTIONS},
    **{name: _along_axis for name in _ALONG_ONE_AXIS},
    "relax.strided_slice": _strided_slice,
    "relax.take": _take,
    "relax.reshape": _reshape,
    "relax.squeeze": _reshape,
    "relax.nn.layer_norm": _layer_norm,
    "relax.nn.rms_norm": _layer_norm,
    "relax.matmul": _matmul,
}


def _describe(x: Expr) -> str:
    """The tensor as a message shows it, such as [1, T, 64]."""
    extents = [
        str(int(e)) if isinstance(e, tvm.tirx.IntImm) else getattr(e, "name", str(e))
        for e in x.ty.shape
    ]
    return f"a tensor [{', '.join(extents)}]"
