"""Prints TIR's expressions as GLSL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import tvm

from llmc.errors import CompileError
from llmc.targets.vulkan.glsl_functions import EXTERNS, MATH, WARP_SHUFFLES, Function
from llmc.targets.vulkan.glsl_integers import (
    FAR,
    WideIntegers,
    raised_dividend,
)
from llmc.targets.vulkan.glsl_storage import Storage
from llmc.targets.vulkan.glsl_types import (
    dtype_of,
    features_of,
    float_literal,
    glsl_type,
    int_literal,
    is_proven_multiple,
    num_bytes,
    split,
    stored,
    with_lanes,
)

Expr: TypeAlias = tvm.ir.Expr

_INFIX = {
    "Add": "+",
    "Sub": "-",
    "Mul": "*",
    "Div": "/",
    "LShift": "<<",
    "RShift": ">>",
    "BitwiseAnd": "&",
    "BitwiseOr": "|",
    "BitwiseXor": "^",
    "And": "&&",
    "Or": "||",
    "shift_left": "<<",
    "shift_right": ">>",
    "bitwise_and": "&",
    "bitwise_or": "|",
    "bitwise_xor": "^",
}
_COMPARISONS = {
    "LT": ("<", "lessThan"),
    "LE": ("<=", "lessThanEqual"),
    "GT": (">", "greaterThan"),
    "GE": (">=", "greaterThanEqual"),
    "EQ": ("==", "equal"),
    "NE": ("!=", "notEqual"),
}
_BITS = {
    ("uint32", "float32"): "uintBitsToFloat",
    ("int32", "float32"): "intBitsToFloat",
    ("float32", "uint32"): "floatBitsToUint",
    ("float32", "int32"): "floatBitsToInt",
    ("uint16", "float16"): "uint16BitsToFloat16",
    ("int16", "float16"): "int16BitsToFloat16",
    ("float16", "uint16"): "float16BitsToUint16",
    ("float16", "int16"): "float16BitsToInt16",
    ("uint32", "uint8x4"): "unpack8",
    ("int32", "int8x4"): "unpack8",
    ("uint8x4", "uint32"): "pack32",
    ("int8x4", "int32"): "pack32",
    ("uint32", "uint16x2"): "unpack16",
    ("int32", "int16x2"): "unpack16",
    ("uint16x2", "uint32"): "pack32",
    ("int16x2", "int32"): "pack32",
    ("uint32", "float16x2"): "unpackFloat2x16",
    ("float16x2", "uint32"): "packFloat2x16",
}


@dataclass(slots=True)
class ExpressionPrinter:
    """Prints expressions; collects the names, references, extensions and features they use.

    Where `wide` is off, int64 is printed as int: TIR computes indices in it, and no buffer has
    2³¹ elements (the runtime checks that of the arguments). Data of 64 bits raise WideIntegers.
    """

    wide: bool = False
    names: dict[Expr, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=lambda: {"main", "pc", "gl"})
    storages: dict[Expr, Storage] = field(default_factory=dict)
    references: set[tuple[str, int, bool]] = field(default_factory=set)  # type, alignment, written
    extensions: set[str] = field(default_factory=set)
    features: set[str] = field(default_factory=set)
    vectors: set[str] = field(default_factory=set)  # shared arrays that are read by four
    helpers: set[tuple[str, str]] = field(default_factory=set)  # name, type of its integers
    analyzer: tvm.sym.Analyzer = field(default_factory=tvm.sym.Analyzer)

    def name_of(self, var: Expr) -> str:
        """The name of a variable, unlike any other and none of GLSL's own."""
        if var not in self.names:
            base = "".join(c if c.isalnum() and c.isascii() else "_" for c in str(var.name))
            # A suffix keeps clear of GLSL's keywords; two underscores in a row are reserved.
            base = "_".join(["v", *filter(None, base.split("_"))])
            name, count = base, 0
            while name in self.taken:
                count += 1
                name = f"{base}_{count}"
            self.taken.add(name)
            self.names[var] = name
        return self.names[var]

    def learn(self, var: Expr, value: Expr | tvm.ir.Range) -> None:
        """Notes what a variable is, for proofs of alignment; another scope may set it again."""
        self.analyzer.bind(var, value, allow_override=True)

    def type_of(self, dtype: str) -> str:
        """GLSL's type for values of `dtype` in a computation."""
        scalar, lanes = split(dtype)
        if not self.wide:
            if scalar == "uint64":
                raise WideIntegers
            scalar = {"int64": "int32"}.get(scalar, scalar)
        return self.stored_type(with_lanes(scalar, lanes))

    def stored_type(self, dtype: str) -> str:
        """GLSL's type for an element in memory; what it needs is noted."""
        self.features.update(features_of(dtype))
        return glsl_type(dtype)

    def print(self, expr: Expr) -> str:
        """The expression as GLSL; raises CompileError where it has no equivalent."""
        kind = type(expr).__name__
        if kind in ("Div", "Mod") and (text := self.raised_division(expr, kind)) is not None:
            return text
        if kind in _INFIX:
            return self._infix(_INFIX[kind], expr.a, expr.b)
        if kind in _COMPARISONS:
            return self._comparison(expr, *_COMPARISONS[kind])
        handler: Callable[[ExpressionPrinter, Expr], str] | None = _HANDLERS.get(kind)
        if handler is None:
            raise CompileError(f"GLSL cannot express {kind}: {str(expr)[:200]}")
        return handler(self, expr)

    def index(self, expr: Expr) -> str:
        """The expression as an index of an array."""
        text = self.print(expr)
        return f"int({text})" if self.wide and "64" in dtype_of(expr) else text

    def element(self, storage: Storage, dtype: str, index: str, *, aligned: bool = True) -> str:
        """`storage[index]` in units of `dtype`, an lvalue."""
        if storage.is_vectors:
            return f"{storage.name}[({index}) >> 2][({index}) & 3]"
        if not storage.is_global:
            return f"{storage.name}[{index}]"
        scalar = split(dtype)[0]
        alignment = num_bytes(dtype) if aligned else num_bytes(scalar)
        reference = self.reference(dtype, alignment, written=storage.is_written)
        return f"{reference}(pc.{storage.name}).v[{index}]"

    def reference(self, dtype: str, alignment: int, *, written: bool) -> str:
        """The type of a pointer to elements of `dtype` in memory."""
        self.stored_type(stored(dtype))
        self.references.add((stored(dtype), alignment, written))
        return reference_name(stored(dtype), alignment, written=written)

    def storage_of(self, buffer: Expr) -> Storage:
        """Where `buffer` lies."""
        if buffer not in self.storages:
            raise CompileError(f"buffer {buffer.name} is used but not declared")
        storage = self.storages[buffer]
        if split(storage.dtype)[0] in ("int64", "uint64") and not self.wide:
            raise WideIntegers
        return storage

    def load(self, expr: Expr) -> str:
        """A load of one element or of a vector of them."""
        storage = self.storage_of(expr.source)
        [index] = expr.indices
        dtype = dtype_of(expr)
        if type(index).__name__ != "Ramp":
            text = self.element(storage, str(expr.source.dtype), self.index(index))
        elif (access := self.vector_access(storage, index, str(expr.source.dtype))) is not None:
            text = access
        else:
            elements = self.elements(storage, index, str(expr.source.dtype))
            return f"{self.type_of(dtype)}({', '.join(elements)})"
        # In memory a bool is a byte, and a narrow int64 has 64 bits.
        return f"{self.type_of(dtype)}({text})" if storage.is_global else text

    def vector_access(self, storage: Storage, index: Expr, dtype: str) -> str | None:
        """An lvalue of consecutive elements at once, where they are aligned; else None."""
        lanes = int(index.lanes)
        contiguous = isinstance(index.stride, tvm.tirx.IntImm) and int(index.stride) == 1
        if split(dtype)[1] != 1 or not contiguous or lanes not in (2, 4):
            return None
        if not (storage.is_global or (storage.can_be_vectors and lanes == 4)):
            return None
        if not is_proven_multiple(index.base, lanes, self.analyzer):
            return None
        if not storage.is_global:
            self.vectors.add(storage.name)
            return (
                f"{storage.name}[({self.index(index.base)}) >> 2]" if storage.is_vectors else None
            )
        unit = f"({self.index(index.base)}) / {lanes}"
        return self.element(storage, with_lanes(dtype, lanes), unit)

    def elements(self, storage: Storage, index: Expr, dtype: str) -> list[str]:
        """The lvalues that a vector index names, one by one."""
        if split(dtype)[1] != 1:
            raise CompileError(f"a vector index into a buffer of vectors: {index}")
        base, stride = self.index(index.base), self.index(index.stride)
        return [
            self.element(storage, dtype, f"{base} + {lane} * {stride}")
            for lane in range(int(index.lanes))
        ]

    def _infix(self, sign: str, a: Expr, b: Expr) -> str:
        if sign in ("&&", "||") and split(dtype_of(a))[1] > 1:
            raise CompileError(f"GLSL has no {sign} of vectors: {a} {sign} {b}")
        return f"({self.print(a)} {sign} {self.print(b)})"

    def _comparison(self, expr: Expr, sign: str, function: str) -> str:
        a, b = self.print(expr.a), self.print(expr.b)
        return f"{function}({a}, {b})" if split(dtype_of(expr.a))[1] > 1 else f"({a} {sign} {b})"

    def constant(self, expr: Expr) -> str:
        """An integer constant; int64 as int where sums with it fit as well."""
        value, dtype = int(expr.value), dtype_of(expr)
        if dtype == "int64" and not self.wide:
            if not -FAR < value < FAR:
                raise WideIntegers
            dtype = "int32"
        self.type_of(dtype)
        return int_literal(value, dtype)

    def choice(self, condition: Expr, true: Expr, false: Expr) -> str:
        """`condition ? true : false`, lane by lane where the condition is a vector."""
        parts = self.print(condition), self.print(true), self.print(false)
        if split(dtype_of(condition))[1] > 1:
            return f"mix({parts[2]}, {parts[1]}, {parts[0]})"
        return f"({parts[0]} ? {parts[1]} : {parts[2]})"

    def modulo(self, expr: Expr, helper: str) -> str:
        """A division or remainder whose sign GLSL leaves open, by a function of ours."""
        dtype = dtype_of(expr)
        a, b = self.print(expr.a), self.print(expr.b)
        if dtype.startswith("float"):
            raise CompileError(f"GLSL has no remainder of floats: {expr}")
        if split(dtype)[1] > 1 or dtype.startswith("uint"):
            return f"({a} {'/' if helper == 'llmc_floordiv' else '%'} {b})"
        bound = self.analyzer.const_int_bound(expr.a)
        if bound.min_value >= 0 and isinstance(expr.b, tvm.tirx.IntImm) and int(expr.b) > 0:
            return f"({a} {'/' if helper == 'llmc_floordiv' else '%'} {b})"
        self.helpers.add((helper, self.type_of(dtype)))
        return f"{helper}({a}, {b})"

    def raised_division(self, expr: Expr, kind: str) -> str | None:
        """A division that TVM made safe for negative numbers, in 32 bits; None if it is another."""
        found = None if self.wide else raised_dividend(expr)
        if found is None:
            return None
        dividend, divisor, multiple = found
        helper = "llmc_floordiv" if kind == "Div" else "llmc_floormod"
        self.helpers.add((helper, "int"))
        text = f"{helper}({self.print(dividend)}, {divisor})"
        return f"({text} + {multiple})" if kind == "Div" else text

    def call(self, expr: Expr) -> str:
        """A call of an intrinsic or of a function by name."""
        name = str(expr.op.name).rpartition(".")[2]
        arguments = list(expr.args)
        if name in ("call_pure_extern", "call_extern"):
            name, arguments = str(arguments[0].value), arguments[1:]
            if name in EXTERNS and name not in MATH:
                return self._function(EXTERNS[name], arguments)
            # The C library's names of float functions end in f.
            name = name if name in MATH else name.removesuffix("f")
        if name in MATH:
            return self._math(MATH[name], expr, arguments)
        if name in _INFIX:
            return self._infix(_INFIX[name], *arguments)
        if name in WARP_SHUFFLES:
            return self._function(WARP_SHUFFLES[name], arguments[1:3])
        if name == "tvm_warp_activemask":
            return "0u"  # shuffles of a subgroup take no mask
        if name == "bitwise_not":
            return f"(~{self.print(arguments[0])})"
        if name == "if_then_else":
            return self.choice(*arguments)
        if name in ("likely", "tvm_thread_invariant"):
            return self.print(arguments[0])
        if name in EXTERNS:
            return self._function(EXTERNS[name], arguments)
        if name == "reinterpret":
            return self._reinterpret(arguments[0], dtype_of(expr))
        raise CompileError(f"GLSL has no function {name}: {str(expr)[:200]}")

    def _function(self, function: Function, arguments: list[Expr]) -> str:
        if function.extension:
            self.extensions.add(function.extension)
            self.features.add(function.feature)
        if function.is_value:
            return function.name
        texts = [self.print(a) for a in arguments]
        if function.extension and arguments and dtype_of(arguments[0]) in ("float16", "int8"):
            self.extensions.add(f"GL_EXT_shader_subgroup_extended_types_{dtype_of(arguments[0])}")
        if function.unsigned_argument is not None:
            at = function.unsigned_argument
            texts[at] = f"uint({texts[at]})"
        return f"{function.name}({', '.join(texts)})"

    def _math(self, function: str, expr: Expr, arguments: list[Expr]) -> str:
        dtype = dtype_of(expr)
        lanes = split(dtype)[1]
        if function.startswith("llmc_"):
            self.helpers.add((function, ""))
        if lanes > 1 and function.startswith("llmc_"):
            raise CompileError(f"{function} of vectors: {str(expr)[:200]}")
        single = glsl_type(with_lanes("float32", lanes))
        texts = [t if dtype == "float32" else f"{single}({t})" for t in map(self.print, arguments)]
        text = f"{function}({', '.join(texts)})"
        return text if split(dtype)[0] == "float32" else f"{self.type_of(dtype)}({text})"

    def _reinterpret(self, value: Expr, dtype: str) -> str:
        source, text = dtype_of(value), self.print(value)
        if source == dtype:
            return text
        (a, lanes), (b, other) = split(source), split(dtype)
        if lanes == other and {a, b} in ({"int32", "uint32"}, {"int8", "uint8"}):
            return f"{self.type_of(dtype)}({text})"
        if lanes == other and (a, b) in _BITS:
            return f"{_BITS[a, b]}({text})"
        if (source, dtype) in _BITS:
            self.type_of(dtype)
            return f"{_BITS[source, dtype]}({text})"
        raise CompileError(f"GLSL cannot take the bits of {source} for {dtype}")


def reference_name(dtype: str, alignment: int, *, written: bool) -> str:
    """The name of a type of pointer."""
    return f"{'Out' if written else 'In'}_{dtype}_{alignment}"


def _let(printer: ExpressionPrinter, expr: Expr) -> str:
    # An expression has no place for a declaration: the value takes the variable's.
    printer.names[expr.var] = f"({printer.print(expr.value)})"
    return printer.print(expr.body)


def _ramp(printer: ExpressionPrinter, expr: Expr) -> str:
    base, stride = printer.print(expr.base), printer.print(expr.stride)
    lanes = ", ".join(f"{base} + {lane} * {stride}" for lane in range(int(expr.lanes)))
    return f"{printer.type_of(dtype_of(expr))}({lanes})"


def _shuffle(printer: ExpressionPrinter, expr: Expr) -> str:
    lanes: list[str] = []
    for vector in expr.vectors:
        text, count = printer.print(vector), split(dtype_of(vector))[1]
        lanes += [text] if count == 1 else [f"{text}[{lane}]" for lane in range(count)]
    chosen = [lanes[int(index)] for index in expr.indices]
    return (
        chosen[0] if len(chosen) == 1 else f"{printer.type_of(dtype_of(expr))}({', '.join(chosen)})"
    )


_HANDLERS: dict[str, Callable[[ExpressionPrinter, Expr], str]] = {
    "Broadcast": lambda p, e: f"{p.type_of(dtype_of(e))}({p.print(e.value)})",
    "BufferLoad": ExpressionPrinter.load,
    "Call": ExpressionPrinter.call,
    "Cast": lambda p, e: f"{p.type_of(dtype_of(e))}({p.print(e.value)})",
    "FloatImm": lambda p, e: float_literal(float(e.value), _noted(p, dtype_of(e))),
    "FloorDiv": lambda p, e: p.modulo(e, "llmc_floordiv"),
    "FloorMod": lambda p, e: p.modulo(e, "llmc_floormod"),
    "IntImm": ExpressionPrinter.constant,
    "Let": _let,
    "Max": lambda p, e: f"max({p.print(e.a)}, {p.print(e.b)})",
    "Min": lambda p, e: f"min({p.print(e.a)}, {p.print(e.b)})",
    "Mod": lambda p, e: p.modulo(e, "llmc_mod"),
    "Not": lambda p, e: f"(!{p.print(e.a)})",
    "BitwiseNot": lambda p, e: f"(~{p.print(e.a)})",
    "Ramp": _ramp,
    "Select": lambda p, e: p.choice(e.condition, e.true_value, e.false_value),
    "Shuffle": _shuffle,
    "TensorLoad": ExpressionPrinter.load,
    "Var": ExpressionPrinter.name_of,
}


def _noted(printer: ExpressionPrinter, dtype: str) -> str:
    printer.type_of(dtype)
    return dtype
