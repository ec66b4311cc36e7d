"""TIR's types as GLSL writes them, and what each needs of a device."""

from __future__ import annotations

import math
import re
import struct

import tvm

from llmc.errors import CompileError

MAX_LANES = 4  # GLSL's vectors have two to four components

_SCALARS = {
    "bool": "bool",
    "float16": "float16_t",
    "float32": "float",
    "float64": "double",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int",
    "int64": "int64_t",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint",
    "uint64": "uint64_t",
}
_VECTORS = {
    "bool": "bvec",
    "float16": "f16vec",
    "float32": "vec",
    "float64": "dvec",
    "int8": "i8vec",
    "int16": "i16vec",
    "int32": "ivec",
    "int64": "i64vec",
    "uint8": "u8vec",
    "uint16": "u16vec",
    "uint32": "uvec",
    "uint64": "u64vec",
}
# What a type needs in arithmetic, and what it needs beyond that in memory; names are Vulkan's.
_FEATURES = {
    "float16": ("shaderFloat16", "storageBuffer16BitAccess"),
    "float64": ("shaderFloat64",),
    "int8": ("shaderInt8", "storageBuffer8BitAccess"),
    "int16": ("shaderInt16", "storageBuffer16BitAccess"),
    "int64": ("shaderInt64",),
    "uint8": ("shaderInt8", "storageBuffer8BitAccess"),
    "uint16": ("shaderInt16", "storageBuffer16BitAccess"),
    "uint64": ("shaderInt64",),
}


def dtype_of(expr: object) -> str:
    """The type of an expression or variable, such as "float32" or "int8x4"."""
    return str(expr.ty.dtype)  # type: ignore[attr-defined]


def split(dtype: str) -> tuple[str, int]:
    """The scalar type and the number of lanes."""
    found = re.fullmatch(r"([a-z]+\d*?[a-z]*\d*)x(\d+)", dtype)
    return (found[1], int(found[2])) if found else (dtype, 1)


def with_lanes(scalar: str, lanes: int) -> str:
    """The type of `lanes` scalars."""
    return scalar if lanes == 1 else f"{scalar}x{lanes}"


def glsl_type(dtype: str) -> str:
    """GLSL's name; raises CompileError where it has none."""
    scalar, lanes = split(dtype)
    if scalar not in _SCALARS or lanes > MAX_LANES:
        raise CompileError(
            f"GLSL has no type {dtype}",
            hint=f"vectors have at most {MAX_LANES} lanes: load wider ones as uint32x4",
        )
    return _SCALARS[scalar] if lanes == 1 else f"{_VECTORS[scalar]}{lanes}"


def stored(dtype: str) -> str:
    """The type an element has in memory: bools are bytes."""
    scalar, lanes = split(dtype)
    return with_lanes("uint8" if scalar == "bool" else scalar, lanes)


def num_bytes(dtype: str) -> int:
    """Bytes of one element in memory."""
    scalar, lanes = split(stored(dtype))
    return int(re.sub(r"\D", "", scalar)) // 8 * lanes


def features_of(dtype: str) -> tuple[str, ...]:
    """What a kernel that uses the type needs of a device."""
    return _FEATURES.get(split(dtype)[0], ())


def float_literal(value: float, dtype: str) -> str:
    """A constant; infinities and NaN by their bits, because GLSL does not define 1.0 / 0.0."""
    name = glsl_type(dtype)
    if math.isfinite(value):
        return repr(value) if dtype == "float32" else f"{name}({value!r})"
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    text = f"uintBitsToFloat(0x{bits:08x}u)"
    return text if dtype == "float32" else f"{name}({text})"


def int_literal(value: int, dtype: str) -> str:
    """A constant of an integer type or bool."""
    if dtype == "bool":
        return "true" if value else "false"
    if dtype == "int32":
        return str(value) if value >= 0 else f"({value})" if value != -(2**31) else "(~0x7fffffff)"
    if dtype == "uint32":
        return f"{value}u"
    if dtype == "int64":
        return f"{value}l" if value >= 0 else f"({value}l)"
    if dtype == "uint64":
        return f"{value}ul"
    return f"{glsl_type(dtype)}({value})"


def is_proven_multiple(expr: tvm.ir.Expr, factor: int, analyzer: tvm.sym.Analyzer) -> bool:
    """Whether an integer expression is a multiple of `factor` whatever its variables are."""
    found = analyzer.modular_set(expr)
    return int(found.coeff) % factor == 0 and int(found.base) % factor == 0
