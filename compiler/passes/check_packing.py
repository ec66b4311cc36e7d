"""Proves that packing sequences along T is sound: no operator but attention mixes tokens.

Stands after canonicalize, before T gets any meaning. Every operator that touches a tensor with the
axis T must be elementwise in it, or one whose treatment of axes is known and leaves T alone. An
operator that reduces, shifts, scans or convolves along T, and any operator this file does not know,
is an UnsupportedError that names it.
"""

from __future__ import annotations

from collections.abc import Callable

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


def check_packing(mod: tvm.IRModule) -> tvm.IRModule:
    """Returns `mod` unchanged, or raises UnsupportedError naming the operator that mixes tokens."""
    for _, func in relax_functions(mod):
        tokens = func.params[0].ty.shape[-1]
        rows = func.params[2].ty.shape[0]
        for binding in bindings(func):
            value = binding.value
            if isinstance(value, relax.Call) and dialect.operator_name(value) is None:
                _check(value, tokens, rows)
    return mod


def _check(call: relax.Call, tokens: tvm.ir.Expr, rows: tvm.ir.Expr) -> None:
    name = call.op.name if isinstance(call.op, tvm.ir.Op) else str(call.op)
    operands = [a for a in _tensors(call) if _token_axes(a, tokens)]
    if not operands or (name in _ELEMENTWISE and _keeps_alignment(operands)):
        return
    for x in operands:
        axes = _token_axes(x, tokens)
        if not _SAFE.get(name, _refuse)(call, x, axes, tokens, rows):
            raise UnsupportedError(
                f"operator {name} on {_describe(x)} mixes the tokens of different sequences "
                "(or is not known not to)",
                hint="models whose layers look at neighbouring tokens outside attention "
                "are not supported",
            )


def _tensors(call: relax.Call) -> list[Expr]:
    """The tensor operands of a call, those in tuples included."""
    found: list[Expr] = []
    for argument in call.args:
        ty = getattr(argument, "ty", None)
        if isinstance(ty, relax.TensorType):
            found.append(argument)
        elif isinstance(argument, relax.Tuple):
            found += [f for f in argument.fields if isinstance(f.ty, relax.TensorType)]
    return found


def _depends_on(extent: tvm.ir.Expr, var: tvm.ir.Expr) -> bool:
    return any(v.same_as(var) for v in tvm.tirx.analysis.undefined_vars(extent))


def _token_axes(x: Expr, tokens: tvm.ir.Expr) -> list[int]:
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
    return f"a tensor {tuple(str(e) for e in x.ty.shape)}"
