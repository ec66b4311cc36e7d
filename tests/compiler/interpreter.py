"""Runs the Relax functions of tests in NumPy, in float64: dialect operators by their definitions.

Independent of TVM's kernels and of llmc's: what a pass changes is judged by the formula.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from llmc import dialect
from llmc.compiler.rewriter import bindings

Arrays = dict[str, np.ndarray]


def run(mod: tvm.IRModule, **values: np.ndarray) -> np.ndarray:
    """What `main` returns for parameters of these names (others may be missing if unread)."""
    [func] = [f for _, f in mod.functions_items() if isinstance(f, relax.Function)]
    env = {p: np.asarray(values[p.name]) for p in func.params if p.name in values}
    extents = {}
    for param, value in env.items():
        for dimension, size in zip(param.ty.shape, value.shape, strict=True):
            if isinstance(dimension, tvm.tirx.Var):
                extents[dimension] = size
    for binding in bindings(func):
        env[binding.var] = _evaluate(binding.value, env, extents)
    return env[func.body.body]


def random_inputs(mod: tvm.IRModule, tokens: int = 5, seed: int = 0) -> Arrays:
    """Normal values for every float32 parameter, ids for int32 ones."""
    rng = np.random.default_rng(seed)
    made = {}
    for param in mod["main"].params:
        shape = [int(e) if isinstance(e, tvm.tirx.IntImm) else tokens for e in param.ty.shape]
        is_float = str(param.ty.dtype) == "float32"
        made[param.name] = rng.normal(size=shape) if is_float else rng.integers(0, 3, shape)
    return made


def assert_same_numbers(before: tvm.IRModule, after: tvm.IRModule, **more: np.ndarray) -> None:
    """Both return the same for random inputs; float64 leaves only the order of sums."""
    values = random_inputs(before) | more
    np.testing.assert_allclose(run(after, **values), run(before, **values), rtol=1e-9, atol=1e-9)


def _evaluate(expr: relax.Expr, env: dict, extents: dict) -> object:
    if expr in env:
        return env[expr]
    if isinstance(expr, tvm.ir.GenericConst):
        return expr.value.numpy().astype(np.float64)
    if isinstance(expr, relax.ShapeExpr):
        return [_extent(v, extents) for v in expr.values]
    if isinstance(expr, relax.Tuple):
        return [_evaluate(f, env, extents) for f in expr.fields]
    if isinstance(expr, relax.TupleGetItem):
        return _evaluate(expr.tuple_value, env, extents)[expr.index]
    if isinstance(expr, tvm.tirx.IntImm):
        return int(expr)
    found = dialect.match_any(expr)
    if found is not None:
        operands = {n: _evaluate(v, env, extents) for n, v in found.operands.items()}
        return DIALECT[type(found.op)](found.op, **operands)
    arguments = [_evaluate(a, env, extents) for a in expr.args]
    return RELAX[expr.op.name.removeprefix("relax.")](expr.attrs, *arguments)


def _extent(value: tvm.ir.Expr, extents: dict) -> int:
    analyzer = tvm.sym.Analyzer()
    for var, extent in extents.items():
        analyzer.bind(var, tvm.tirx.const(extent, "int64"))
    return int(analyzer.simplify(value))


def _axes(attrs: object) -> tuple[int, ...] | None:
    return None if attrs.axis is None else tuple(int(a) for a in attrs.axis)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _slice(attrs: object, x: np.ndarray, axes: list, begins: list, ends: list, *rest: list):
    strides = rest[0] if rest else [1] * len(axes)
    index = [slice(None)] * x.ndim
    for axis, begin, end, stride in zip(axes, begins, ends, strides, strict=True):
        index[axis] = slice(begin, end, stride)
    return x[tuple(index)]


def _split(attrs: object, x: np.ndarray) -> list[np.ndarray]:
    sections, axis = attrs.indices_or_sections, int(attrs.axis)
    if isinstance(sections, tvm.tirx.IntImm | int):
        width = -(-x.shape[axis] // int(sections))
        cuts = list(range(width, x.shape[axis], width))
    else:
        cuts = [int(c) for c in sections]
    return np.split(x, cuts, axis)


RELAX = {
    "add": lambda attrs, a, b: a + b,
    "subtract": lambda attrs, a, b: a - b,
    "multiply": lambda attrs, a, b: a * b,
    "power": lambda attrs, a, b: a**b,
    "negative": lambda attrs, a: -a,
    "rsqrt": lambda attrs, a: 1 / np.sqrt(a),
    "mean": lambda attrs, a: a.mean(_axes(attrs), keepdims=bool(attrs.keepdims)),
    "matmul": lambda attrs, a, b: a @ b,
    "reshape": lambda attrs, a, shape: a.reshape(shape),
    "expand_dims": lambda attrs, a: np.expand_dims(a, _axes(attrs)),
    "broadcast_to": lambda attrs, a, shape: np.broadcast_to(a, shape),
    "repeat": lambda attrs, a: np.repeat(a, int(attrs.repeats), int(attrs.axis)),
    "permute_dims": lambda attrs, a: a.transpose(
        None if attrs.axes is None else [int(i) for i in attrs.axes]
    ),
    "concat": lambda attrs, pieces: np.concatenate(pieces, int(attrs.axis)),
    "strided_slice": _slice,
    "split": _split,
    "take": lambda attrs, a, ids: np.take(a, ids, int(attrs.axis)),
    "nn.silu": lambda attrs, a: _silu(a),
    "nn.relu": lambda attrs, a: np.maximum(a, 0),
}


def _linear(op, x, weight, bias=0.0, residual=0.0):
    return x @ (weight if op.transposed else weight.T) + bias + residual


def _rms_norm(op, x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + op.eps) * (weight + op.offset)


def _add_rms_norm(op, x, residual, weight):
    total = x + residual
    return total, _rms_norm(op, total, weight)


def _rope(op, x, cos, sin):
    head, rest = x[..., : op.rotary_dim], x[..., op.rotary_dim :]
    half = op.rotary_dim // 2
    rotated = np.concatenate([-head[..., half:], head[..., :half]], -1)
    turned = head * cos[:, :, None] + rotated * sin[:, :, None]
    return np.concatenate([turned, rest], -1)


def _gated(op, x):
    half = x.shape[-1] // 2
    act = {"silu": _silu, "relu": lambda v: np.maximum(v, 0)}[op.kind]
    return act(x[..., :half]) * x[..., half:]


def _attention(op, query, key, value, sinks=None):
    assert sinks is None
    group = query.shape[1] // key.shape[1]
    key, value = (np.repeat(x, group, axis=1) for x in (key, value))
    scores = query @ key.swapaxes(2, 3) * op.scale
    i, j = np.indices(scores.shape[2:])
    visible = (j <= i) & (True if op.window is None else j > i - op.window)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ value).transpose(0, 2, 1, 3)


DIALECT = {
    dialect.Linear: _linear,
    dialect.Embedding: lambda op, ids, weight: weight[ids],
    dialect.RmsNorm: _rms_norm,
    dialect.AddRmsNorm: _add_rms_norm,
    dialect.Rope: _rope,
    dialect.GatedActivation: _gated,
    dialect.Attention: _attention,
}
