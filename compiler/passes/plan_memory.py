"""Places for the tensors of a step: those that live at other times lie at one place.

    a = builtin.alloc_tensor(T, 8192)          s = alloc_storage(16 MiB)
    …                                          a = memory.alloc_tensor(s, 0, (T, 8192))
    b = builtin.alloc_tensor(T, 2048)          b = memory.alloc_tensor(s, 0, (T, 2048))

Every tensor counts with its size at the upper bounds of its function. The largest is placed first,
each one at the smallest place that is free while it lives; where none is, it gets one of its own.
TVM's own planning takes tensors in the order of the program, and so gives small ones what large
ones need later.

The functions of one module run one after the other, and TVM's pool keeps a storage for every size
that was ever asked for. So the largest storages of all functions become equally large, the second
largest, and so on: together they take what the most demanding one of each rank takes, not the sum.

What a function returns is the caller's and shares its place with nothing. It has a place of its
size, or, where memory that nobody writes to takes none, at its bound: else the pool would come to
keep a tensor for each number of rows.

Stands behind `CallTIRRewrite` and `lift_scratch`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from math import prod

import numpy as np
import tvm
from tvm import relax, sym

from llmc.compiler.rewriter import (
    Expr,
    bindings,
    op_args,
    origins,
    relax_functions,
    with_bindings,
)

PLANNED_BYTES = "llmc.planned_bytes"  # of a function: what it allocates at its bounds
_ALLOC = "relax.builtin.alloc_tensor"
_PAGE_BYTES = 4096  # what TVM's pool rounds up to


@dataclass(slots=True)
class _Tensor:
    """A tensor that a function allocates, and the first and the last binding that it lives at."""

    var: relax.Var
    num_bytes: int
    first: int
    last: int


@dataclass(slots=True)
class _Storage:
    """A place, as large as the first of its tensors."""

    num_bytes: int
    tensors: list[_Tensor] = field(default_factory=list)

    def is_free(self, tensor: _Tensor) -> bool:
        """Whether none of its tensors lives while `tensor` does."""
        return all(t.last < tensor.first or tensor.last < t.first for t in self.tensors)


@dataclass(slots=True)
class _Plan:
    """The storages of a function, the largest first, and those of what it returns."""

    storages: list[_Storage]
    results: list[_Storage]


def plan_memory(mod: tvm.IRModule, *, results_at_bounds: bool = False) -> tvm.IRModule:
    """Gives every tensor of bounded size in `mod`, whose functions are plain sequences, its place.

    Each function's own bytes, its results' included, become its attribute PLANNED_BYTES.
    """
    plans = {name: _plan(func) for name, func in relax_functions(mod)}
    storages = _ranked([plan.storages for plan in plans.values()])
    results = _ranked([plan.results for plan in plans.values()])
    out = mod.clone()
    for name, plan in plans.items():
        places = dict(_places(plan.storages, storages))
        if results_at_bounds:
            places |= _places(plan.results, results)
        num_bytes = sum(s.num_bytes for s in plan.storages + plan.results)
        out[name] = _placed(mod[name], places).with_attr(PLANNED_BYTES, num_bytes)
    return out


def pooled_bytes(mod: tvm.IRModule) -> int:
    """What TVM's pool holds when all functions of a planned `mod` have run at their bounds.

    It keeps what is released, and gives it out again where exactly as much is asked for. What a
    function returns lives on beside all that the next ones take: the VM itself holds the result of
    its last call until that of the next.
    """
    kept: Counter[int] = Counter()
    returned: Counter[int] = Counter()
    for _, func in relax_functions(mod):
        sizes, results = _allocated(func)
        kept |= Counter(size for var, size in sizes.items() if var not in results)
        returned |= Counter(size for var, size in sizes.items() if var in results)
    return sum(size * count for size, count in (kept + returned).items())


def _allocated(func: relax.Function) -> tuple[dict[relax.Var, int], set[relax.Var]]:
    """The bytes of each storage, and of each tensor that is allocated by itself at its bound; and
    which of them it returns.
    """
    sizes: dict[relax.Var, int] = {}
    within: dict[relax.Var, set[relax.Var]] = {}
    for binding in bindings(func):
        var, value = binding.var, binding.value
        storage = op_args(value, "relax.memory.alloc_storage")
        if storage is None and op_args(value, _ALLOC) is None:
            within[var] = origins(value, within)
            continue
        within[var] = {var}
        num_bytes = int(storage[0].values[0]) if storage else bounded_bytes(value, func)
        if num_bytes is not None:
            sizes[var] = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
    return sizes, origins(func.body.body, within)


def bounds_of(func: relax.Function) -> dict[str, int]:
    """The upper bounds of a function's symbolic extents, by their names."""
    given = func.attrs and func.attrs.get("tir_var_upper_bound")
    return {str(name): int(bound) for name, bound in dict(given or {}).items()}


def upper_bound(extent: Expr, bounds: Mapping[str, int]) -> int | None:
    """The most that an expression of bounded variables can be; None where one has no bound."""
    analyzer = sym.Analyzer()
    for var in tvm.tirx.analysis.undefined_vars(extent):
        if var.name not in bounds:
            return None
        analyzer.bind(var, tvm.ir.Range(0, bounds[var.name] + 1), allow_override=True)
    return int(analyzer.const_int_bound(extent).max_value)


def bounded_bytes(call: relax.Call, func: relax.Function) -> int | None:
    """Bytes of what `call` allocates, with symbolic extents at the bounds of `func`; None without
    bounds.
    """
    extents = [upper_bound(extent, bounds_of(func)) for extent in call.args[0].values]
    if None in extents:
        return None
    return prod(e or 0 for e in extents) * np.dtype(str(call.args[1].value)).itemsize


def _plan(func: relax.Function) -> _Plan:
    tensors, returned = _tensors(func)
    storages: list[_Storage] = []
    for tensor in sorted(tensors, key=lambda t: (-t.num_bytes, t.first)):
        storage = next((s for s in reversed(storages) if s.is_free(tensor)), None)
        if storage is None:
            storage = _Storage(tensor.num_bytes)
            storages.append(storage)
        storage.tensors.append(tensor)
    returned.sort(key=lambda t: -t.num_bytes)
    return _Plan(storages, [_Storage(t.num_bytes, [t]) for t in returned])


def _ranked(plans: list[list[_Storage]]) -> list[int]:
    """The sizes of the largest storages of all plans, the second largest, and so on."""
    ranks = zip_longest(*([s.num_bytes for s in plan] for plan in plans), fillvalue=0)
    return [max(rank) for rank in ranks]


def _tensors(func: relax.Function) -> tuple[list[_Tensor], list[_Tensor]]:
    """What is allocated with a bound: what the function keeps, and what it returns."""
    found: dict[relax.Var, _Tensor] = {}
    within: dict[relax.Var, set[relax.Var]] = {}  # the allocations that a variable may be part of
    for number, binding in enumerate(bindings(func)):
        assert isinstance(binding, relax.VarBinding), binding
        var, value = binding.var, binding.value
        if op_args(value, _ALLOC) is not None:
            within[var] = {var}
            num_bytes = bounded_bytes(value, func)
            if num_bytes is not None:
                found[var] = _Tensor(var, num_bytes, number, number)
            continue
        # Whatever reads a tensor may give it on, or a view of it: reshapes do, kernels do not.
        within[var] = origins(value, within)
        for origin in within[var] & found.keys():
            found[origin].last = number
    returned = origins(func.body.body, within)
    kept = [tensor for var, tensor in found.items() if var not in returned]
    return kept, [tensor for var, tensor in found.items() if var in returned]


class _Place:
    """Where tensors of a function lie, and the variable of the storage once it is allocated."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._storage: relax.Var | None = None

    def allocate(self, tensor: relax.VarBinding) -> Iterator[relax.VarBinding]:
        """The bindings that make `tensor` here in place of its own."""
        if self._storage is None:
            size = relax.ShapeExpr([self._num_bytes])
            storage = relax.op.memory.alloc_storage(size, 0, "global", "uint8")
            storage = relax.BlockBuilder().normalize(storage)
            self._storage = relax.Var("storage", storage.ty)
            yield relax.VarBinding(self._storage, storage)
        shape, dtype, *_ = tensor.value.args
        value = relax.op.memory.alloc_tensor(self._storage, 0, shape, dtype)
        yield relax.VarBinding(tensor.var, relax.BlockBuilder().normalize(value))


def _places(storages: list[_Storage], sizes: list[int]) -> Iterator[tuple[relax.Var, _Place]]:
    """The place of each tensor, by its variable."""
    for storage, size in zip(storages, sizes, strict=False):
        place = _Place(size)
        yield from ((tensor.var, place) for tensor in storage.tensors)


def _placed(func: relax.Function, places: dict[relax.Var, _Place]) -> relax.Function:
    """`func` with its tensors at their places."""
    made: list[relax.Binding] = []
    for binding in bindings(func):
        place = places.get(binding.var)
        made += [binding] if place is None else place.allocate(binding)
    return with_bindings(func, made)
