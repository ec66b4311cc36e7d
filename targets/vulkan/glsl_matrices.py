"""Prints TVM's matrix fragments as cooperative matrices (GL_KHR_cooperative_matrix).

    buffers of scope wmma.matrix_a, wmma.matrix_b    float16
    buffers of scope wmma.accumulator                float32
    tvm_fill_fragment, tvm_load_matrix_sync, tvm_mma_sync, tvm_store_matrix_sync

Shapes are 16 × 16 × 16, which drivers have in common; matrices are read from shared memory and
written to it. A buffer of several has 256 elements for each.
"""

from __future__ import annotations

from llmc.errors import CompileError
from llmc.targets.vulkan.glsl_expressions import Expr, ExpressionPrinter

SIDE = 16
FEATURES = ("cooperativeMatrix16x16x16", "shaderFloat16", "vulkanMemoryModel")
"""What they need of a device, by names that the runtime knows."""
EXTENSIONS = ("GL_KHR_cooperative_matrix", "GL_KHR_memory_scope_semantics")
_USES = {
    "wmma.matrix_a": ("float16", "float16_t", "gl_MatrixUseA"),
    "wmma.matrix_b": ("float16", "float16_t", "gl_MatrixUseB"),
    "wmma.accumulator": ("float32", "float", "gl_MatrixUseAccumulator"),
}
_LAYOUTS = {
    "row_major": "gl_CooperativeMatrixLayoutRowMajor",
    "col_major": "gl_CooperativeMatrixLayoutColumnMajor",
}


def is_matrix_scope(scope: str) -> bool:
    """Whether buffers of the scope hold matrices."""
    return scope in _USES


def matrix_type(scope: str, dtype: str) -> str:
    """GLSL's type of the scope's matrices; raises CompileError for elements of another type."""
    element, name, use = _USES[scope]
    if dtype != element:
        raise CompileError(f"a matrix of {dtype} in {scope}, whose elements are {element}")
    return f"coopmat<{name}, gl_ScopeSubgroup, {SIDE}, {SIDE}, {use}>"


def print_matrix_call(printer: ExpressionPrinter, name: str, arguments: list[Expr]) -> str | None:
    """The statement that a call of TVM's is; None for one that is not about matrices."""
    if name == "tvm_mma_sync":
        d, a, b, c = (_matrix(printer, *arguments[at : at + 2]) for at in range(0, 8, 2))
        return f"{d} = coopMatMulAdd({a}, {b}, {c});"
    if name not in ("tvm_fill_fragment", "tvm_load_matrix_sync", "tvm_store_matrix_sync"):
        return None
    shape = [int(extent) for extent in arguments[1:4]]
    if shape != [SIDE] * 3:
        raise CompileError(f"matrices of {shape}: those of Vulkan here are {SIDE} × {SIDE}")
    matrix = _matrix(printer, arguments[0], arguments[4])
    if name == "tvm_fill_fragment":
        kind = matrix_type("wmma.accumulator", "float32")
        return f"{matrix} = {kind}({printer.print(arguments[5])});"
    array, index = _place(printer, arguments[5])
    stride, layout = printer.index(arguments[6]), str(arguments[7].value)
    if layout not in _LAYOUTS:
        raise CompileError(f"a matrix in the order {layout!r}")
    function = "coopMatLoad" if name == "tvm_load_matrix_sync" else "coopMatStore"
    return f"{function}({matrix}, {array}, {index}, {stride}, {_LAYOUTS[layout]});"


def _matrix(printer: ExpressionPrinter, data: Expr, number: Expr) -> str:
    """One matrix of an allocation, by its pointer."""
    storage = printer.storage_of(data.args[0] if type(data).__name__ == "Call" else data)
    return f"{storage.name}[{printer.index(number)}]"


def _place(printer: ExpressionPrinter, pointer: Expr) -> tuple[str, str]:
    """The shared array that a pointer points into, and the index there."""
    load = pointer.args[0]
    storage = printer.storage_of(load.source)
    if not storage.is_shared or storage.is_vectors:
        raise CompileError(f"matrices are read from plain shared memory, not from {storage.name}")
    [index] = load.indices
    return storage.name, printer.index(index)
